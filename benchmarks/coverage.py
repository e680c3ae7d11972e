"""Every causal language model that transformers ships: found, compiled, and right?

    python benchmarks/coverage.py [--types llama opt] [--jobs 2]

For each model type a small random decoder generates 8 tokens, eager and compiled, with nothing attached and
then with random units and heads selected at every site that was found; the oracle of the second is the eager
model with the others zeroed by hooks. What should have been found is counted on the eager model too: calls
of softmax attention of a step, and projections from another width back to the residual stream's. What was found is
read off the graphs that the compiled model's steps ran: an attention that is in no site has the reason that `dv.explain`
gives, or was captured and is dead code, or was in no graph at all. Writes docs/coverage.md and
benchmarks/results/coverage.json. Each type is a process of its own: one that crashes ends nothing else.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
NEW_TOKENS, PROMPT, LAYERS = 8, 9, 2
LIMIT_S = 900
TOLERANCE = 1e-4
CONTEXT = multiprocessing.get_context("forkserver")

WIDTH, HEADS, MLP = 64, 4, 176
# What a small decoder sets, under every name that a config may have for it
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "emb_dim",
                     "embedding_size", "word_embed_proj_dim", "attention_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
                     "encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff",
                     "ffn_hidden_size", "shared_intermediate_size", "dim_feedforward", "d_inner",
                     "feed_forward_size", "decoder_intermediate_size"), MLP),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "expert_intermediate_size", "mlp_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                     "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk",
                     "moe_top_k"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim", "d_kv",
                     "kv_channels"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
                     "max_sequence_length", "max_target_positions", "context_length"), 128),
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16,
    "is_decoder": True, "use_cache": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "sliding_window": 32, "state_size": 16,
    "num_kv_shared_layers": 0, "activation_sparsity_pattern": None, "attention_window_size": 32,
    "n_groups": 1, "mamba_n_groups": 1, "chunk_size": 16,
}  # fmt: skip
# Multi-head latent attention rotates a part of each head, which its configs call `head_dim`.
LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
          "kimi_linear", "longcat_flash", "minicpm3")  # fmt: skip
# Hybrids, one layer of each kind
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
# What a few configs need beside `SMALL`
ALSO: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 8, "num_key_value_heads": HEADS} for kind in LATENT},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), LINEAR_FIRST),
    "kimi_linear": {"head_dim": 8, "num_key_value_heads": HEADS, **LINEAR_FIRST},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dots1": {"n_shared_experts": 1},
}


def config_of(kind: str) -> Any:
    """A config of a few hundred thousand parameters."""
    from transformers import CONFIG_MAPPING

    make = CONFIG_MAPPING[kind]
    known = make().to_dict()

    def small(fields: dict[str, Any]) -> dict[str, Any]:
        chosen = {k: v for k, v in SMALL.items() if k in fields}
        for name, value in fields.items():
            if (
                name.endswith("_config")
                and isinstance(value, dict)
                and name != "quantization_config"
            ):
                chosen[name] = small(value)
        return chosen

    return make(**small(known) | ALSO.get(kind, {}))


def build(kind: str) -> Any:
    """A random fp32 decoder whose every layer matters."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = config_of(kind)
    make = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, make.config_class):  # of a model that sees or hears too
        config = config.get_text_config(decoder=True)
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


# --- what there is to find, counted on the eager model ----------------------------------------------------


class Counting:
    """Calls of softmax attention of one decode step, and projections back to the residual stream's width."""

    def __init__(self, model: Any) -> None:
        import torch
        import torch.nn.functional as F
        from torch.overrides import TorchFunctionMode

        softmaxes = _softmaxes()
        names = {id(p): n for n, p in model.named_parameters()}
        self.attentions, self.mlps = 0, set()
        outer = self

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func is F.scaled_dot_product_attention:
                    outer.attentions += 1
                elif func in softmaxes:
                    outer.attentions += args[0].dim() >= 3 and args[0].shape[-1] > PROMPT
                elif func in (
                    F.linear,
                    torch.addmm,
                    torch.matmul,
                    torch.Tensor.matmul,
                    torch.Tensor.__matmul__,
                ):
                    weights = [
                        a for a in args if isinstance(a, torch.nn.Parameter) and a.dim() == 2
                    ]
                    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]
                    if weights and inputs[0].shape[-1] != WIDTH and WIDTH in weights[0].shape:
                        outer.mlps.add(names.get(id(weights[0]), "?"))
                return func(*args, **(kwargs or {}))

        self.mode = Mode()


def _softmaxes() -> tuple[Any, ...]:
    """A softmax, in eager code or in a graph of Dynamo's."""
    import torch
    import torch.nn.functional as F

    return F.softmax, torch.softmax, torch.Tensor.softmax, "softmax"


def captured(gm: Any) -> tuple[int, int]:
    """Calls of softmax attention in a graph of Dynamo's, which may have been made for the prompt; and those unread."""
    import torch.nn.functional as F

    softmaxes, found = _softmaxes(), []
    for node in gm.graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            found.append(node)
        elif node.target in softmaxes:
            shape = node.meta["example_value"].shape
            length = shape[-1] if isinstance(shape[-1], int) else shape[-1].node.hint
            if len(shape) >= 3 and length >= PROMPT:
                found.append(node)
    return len(found), sum(not _is_read(node) for node in found)


def _is_read(node: Any) -> bool:
    """It reaches what the graph returns, or something that is written in place."""
    seen, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node.op == "output" or str(getattr(node.target, "__name__", node.target)).endswith(
            ("_", "setitem")
        ):
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.users)
    return False


def generate(model: Any) -> Any:
    """Logits [steps, vocabulary] of greedy generation, after a prompt."""
    import torch

    ids = torch.arange(PROMPT)[None] * 7 % 120 + 3
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True, use_cache=True,
    )  # fmt: skip
    return torch.stack(out.logits)[:, 0]


def difference(got: Any, want: Any) -> float:
    """Largest error, relative to the largest logit."""
    if got.shape != want.shape:
        return 9.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-9)).item()


# --- one type ------------------------------------------------------------------------------------------------


def examine(kind: str) -> dict[str, Any]:
    """Everything about one model type; `stage` is where it ended."""
    result: dict[str, Any] = {"type": kind, "stage": "build"}
    try:
        model = build(kind)
        result["stage"] = "eager"
        want = generate(model)
        if not want.isfinite().all():
            raise ValueError("its logits are NaN with random weights")
        result["stage"] = "count"
        found_by_eye = count(model)
        result |= {"mlps": len(found_by_eye.mlps), "attentions": found_by_eye.attentions}
        result["stage"] = "compile"
        result |= lossless(model, want, found_by_eye)
        result["stage"] = "sparse"
        # A hook can't tell which of a weight's uses is sparse; nor is it an oracle where capture changes results
        if result["times_a_step"] == 1 and result["error_of_capture"] <= TOLERANCE:
            result |= sparse(model, want, result["_sites"])
        result["stage"] = "done"
    except Exception as error:
        said = [text for text in str(error).splitlines() if text.strip()][:2]
        result["error"] = f"{type(error).__name__}: {' '.join(said)[:300]}"
    result.pop("_sites", None)
    return result


def count(model: Any) -> Counting:
    """What one decode step calls: that of two new tokens, less that of one."""
    import torch

    ids = torch.arange(PROMPT)[None] * 7 % 120 + 3
    seen = []
    for tokens in (1, 2):
        seen.append(Counting(model))
        with seen[-1].mode:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                           use_cache=True)  # fmt: skip
    seen[1].attentions -= seen[0].attentions
    return seen[1]


@dataclass(frozen=True)
class Ran:
    """One run of a graph: what was found in it, what it calls the model's parameters, and `captured` of it."""

    found: Any
    names: dict[str, str]
    captured: int
    unread: int

    def named(self, name: str) -> str:
        """A parameter's name in the model."""
        return self.names.get(name, name)


class Running:
    """A backend, and the graphs that each call of the model ran."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, []

    def __call__(self, gm: Any, inputs: Any) -> Any:
        """`dejavu_eager`, noting each run."""
        from dejavu_compile._compat import guard_identity, names_in

        backend, prepared = sys.modules["dejavu_compile.backend"], []
        prepare, counted = backend.prepare, captured(gm)
        backend.prepare = lambda *args: prepared.append(prepare(*args)) or prepared[-1]
        try:
            compiled = backend.dejavu_eager(gm, inputs)
        finally:
            backend.prepare = prepare
        (done,) = prepared
        for site in done.found.sites:  # layers that are alike may be one graph: see each
            guard_identity(site.output.weight)

        def run(*args: Any) -> Any:
            self.calls[-1].append(Ran(done.found, names_in(self.model, gm, args), *counted))
            return compiled(*args)

        return run

    def generate(self) -> Any:
        """Compiled; `calls` then holds the prompt's and each step's."""
        import torch

        from dejavu_compile._compat import recompile_limit

        forward, self.calls = self.model.forward, []
        handle = self.model.register_forward_pre_hook(lambda *_: self.calls.append([]))
        try:
            self.model.forward = torch.compile(forward, backend=self)
            with recompile_limit(64):
                return generate(self.model)
        finally:
            self.model.forward = forward
            handle.remove()


def lossless(model: Any, want: Any, expected: Counting) -> dict[str, Any]:
    """Compiled with nothing attached; and which sites were found."""
    import torch
    from torch._dynamo.utils import counters

    counters.clear()
    running = Running(model)
    got = running.generate()
    breaks = dict(counters["graph_break"])
    error = difference(got, want)
    if error > TOLERANCE:  # is it us, or what the model does when it is captured?
        torch.compiler.reset()
        forward = model.forward
        try:
            model.forward = torch.compile(forward, backend="eager")
            error = difference(got, generate(model))
        finally:
            model.forward = forward
    steps = running.calls[1:]
    ran = [run for step in steps for run in step]
    named = {run.named(s.name): (s, run.names) for run in ran for s in run.found.sites}
    sites = {name: site for name, (site, _) in named.items()}
    reasons = {run.named(u.projection.name): u.reason for run in ran for u in run.found.unmatched}
    # A layer may run several times a step.
    times = Counter()
    for step in steps:
        times |= Counter(run.named(site.name) for run in step for site in run.found.sites)
    return {
        "error_lossless": error,
        "error_of_capture": difference(got, want),
        "graph_breaks": sum(breaks.values()),
        "break_reason": next(iter(breaks), "")[:160].splitlines()[:1],
        # What attention's own width goes back from is no MLP.
        "mlps": sum(n not in sites or sites[n].kind == "mlp" for n in expected.mlps),
        "sites_mlp": sum(site.kind == "mlp" for site in sites.values()),
        **_attentions(steps[-1], expected.attentions),
        "exact": sum(s.exact is not None for s in sites.values()),
        "missed_mlps": {
            n: reasons.get(n, "not in the graph") for n in sorted(expected.mlps - set(sites))
        },
        "times_a_step": max(times.values(), default=1),
        "_sites": named,
    }


def _attentions(step: list[Ran], expected: int) -> dict[str, Any]:
    """Of the attentions that one step calls, how many are in sites, and why the others aren't."""
    held = sum(len({n for s in run.found.sites for n in s.attended}) for run in step)
    lone = Counter(_general(found.reason) for run in step for found in run.found.lone)
    rest = max(0, expected - held - lone.total())
    inside = sum(run.captured - run.unread for run in step) - held - lone.total()
    for reason, number in (
        ("nothing reads what it computes", sum(run.unread for run in step)),
        ("its softmax isn't between products that the analysis can read", inside),
        ("Dynamo captured it in no graph", rest),
    ):
        lone[reason] = max(0, min(rest, number))
        rest -= lone[reason]
    return {"sites_attention": held, "lone_attention": dict(+lone)}


def sparse(model: Any, dense: Any, sites: dict[str, tuple[Any, dict]]) -> dict[str, Any]:
    """Half of the units and heads of each site with one before it, chosen at random and for good.

    `sites`: of each name in the model, the site and what its graph calls the model's parameters.
    """
    import torch

    chosen = dict(_attach_half(model, sites))
    if not chosen:
        return {"sites_sparse": 0}
    modules = {f"{n}.weight": m for n, m in model.named_modules()}
    fired: set[str] = set()
    handles = []
    for name, keep in chosen.items():

        def zero(module: Any, args: tuple, name: str = name, keep: Any = keep) -> tuple:
            if args[0].numel() != args[0].shape[-1]:
                return args  # prefill is dense
            fired.add(name)
            width = args[0].shape[-1] // keep.numel()
            return (args[0] * keep.repeat_interleave(width), *args[1:])

        if name in modules:
            handles.append(modules[name].register_forward_pre_hook(zero))
    want = generate(model)
    for handle in handles:
        handle.remove()
    if not fired:  # each of its steps is the whole text again, which is dense as a prompt is
        return {"sites_sparse": 0}
    torch.compiler.reset()
    forward = model.forward
    try:
        model.forward = torch.compile(
            forward, backend="dejavu_eager", options={"dejavu.exact": False}
        )
        got = generate(model)
    finally:
        model.forward = forward
    return {
        "sites_sparse": len(chosen),
        "oracle_misses": sorted(set(chosen) - fired),
        "error_sparse": difference(got, want),
        "sparse_from_dense": difference(want, dense),
    }


def _attach_half(model: Any, sites: dict[str, tuple[Any, dict]]) -> list[tuple[str, Any]]:
    """Predictors whose bias alone decides, read one site earlier; (name, units that run)."""
    import weakref

    import torch

    from dejavu_compile.attachments import Attachment, attach, fingerprint, make_unit_major
    from dejavu_compile.passes.site import Policy, PredictorWeights

    parameters = dict(model.named_parameters(remove_duplicate=False))
    before: dict[str, Any] = {}
    chosen = []
    for number, (name, (site, names)) in enumerate(sites.items()):
        earlier, before[site.kind] = before.get(site.kind, (None, None)), (name, site)
        source, previous = earlier
        out = parameters.get(name)
        if (
            previous is None
            or out is None
            or previous.output.node.graph is not site.output.node.graph
        ):
            continue
        generator = torch.Generator().manual_seed(number)
        keep = torch.rand(site.units, generator=generator) < 0.5
        width = previous.input.meta["val"].shape[-1]
        bias = torch.where(keep, 1.0, -1.0)
        heads = str(site.kind) == "attention"
        down = None if heads else torch.zeros(2, width)
        up = torch.zeros(site.units, width if heads else 2)
        for projection in (*site.projections, site.output):
            weight = parameters.get(names.get(projection.name, projection.name))
            if weight is not None:
                make_unit_major(
                    weight, projection.contracted, produces_units=projection is not site.output
                )
        attach(
            out,
            Attachment(Policy.PREDICT, 0.1, fingerprint(out), source=weakref.ref(parameters[source]),
                       predictor=PredictorWeights(down, up, bias), lookahead=1),
        )  # fmt: skip
        chosen.append((name, keep.float()))
    return chosen


# --- all of them -------------------------------------------------------------------------------------------


def kinds() -> list[str]:
    """The model types of transformers that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def in_a_process(kind: str) -> dict[str, Any]:
    """`examine`, where a crash or a hang costs one row. Forked from a process that has imported everything."""
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send, args=(kind, send))
    started = time.monotonic()
    process.start()
    send.close()
    try:
        if receive.poll(LIMIT_S):
            result = receive.recv()
        else:
            result = {"type": kind, "stage": "timeout", "error": f"more than {LIMIT_S} s"}
    except EOFError:
        process.join()
        result = {"type": kind, "stage": "crash", "error": f"exit status {process.exitcode}"}
    process.kill()
    process.join()
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _send(kind: str, to: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # logs hold on to the streams that they began with
        os.dup2(nowhere, descriptor)
    to.send(examine(kind))


def page(rows: list[dict[str, Any]]) -> str:
    """docs/coverage.md."""
    ran = [r for r in rows if r["stage"] not in ("build", "eager", "crash", "timeout")]
    right = [r for r in ran if r.get("error_lossless", 1) <= TOLERANCE]
    sparse_ran = [r for r in ran if r.get("sites_sparse")]
    sparse_right = [r for r in sparse_ran if r.get("error_sparse", 1) <= TOLERANCE]
    missed = sum(len(_missed_mlps(r)) for r in right)
    mlps = sum(r["mlps"] - len(r["missed_mlps"]) for r in right) + missed
    attentions = sum(r["attentions"] for r in right)
    found = sum(min(r["sites_attention"], r["attentions"]) for r in right)
    lines = [
        "# Coverage", "",
        "Written by `python benchmarks/coverage.py`; what each column means is said there.", "",
        f"- {len(ran)} of {len(rows)} model types run eagerly from a small random config; of these "
        f"{len(right)} give eager's logits when compiled (within {TOLERANCE:g}, relative).",
        f"- {len(sparse_right)} of {len(sparse_ran)} with predicted sites equal the eager model with the other "
        "units zeroed.",
        f"- Found: {mlps - missed} of {mlps} MLPs ({_share(mlps - missed, mlps)}), {found} of {attentions} calls of "
        f"softmax attention ({_share(found, attentions)}). State spaces, linear attention and maps of embeddings "
        "are told apart by the names of their modules.",
        "", "| model type | graph breaks | MLPs | attention | lossless | sparse | what was missed, and why |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in ran:
        cells = [r["type"], r.get("graph_breaks", ""), f"{r.get('sites_mlp', 0)} of {r['mlps']}",
                 f"{r.get('sites_attention', 0)} of {r['attentions']}", _figure(r.get("error_lossless")),
                 _figure(r.get("error_sparse")), _why(r)]  # fmt: skip
        lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
    rest = [r for r in rows if r not in ran]
    if rest:
        lines += ["", "Not run: the generic config doesn't make a working model.", ""]
        lines += [f"- {r['type']} ({r['stage']}): {r.get('error', '')}" for r in rest]
    return "\n".join(lines) + "\n"


OTHER_STRUCTURE = re.compile("mamba|mixer|attn|attention|embed")


def _missed_mlps(row: dict[str, Any]) -> list[str]:
    """The projections from another width that are neither found nor a part of something else."""
    return [name for name in row["missed_mlps"] if not OTHER_STRUCTURE.search(name)]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none there"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _why(row: dict[str, Any]) -> str:
    """The reasons of what was missed, each once, with how often; and an error."""
    reasons = list(row.get("missed_mlps", {}).values())
    counted = Counter(_general(r) for r in reasons)
    if row.get("sites_attention", 0) < row["attentions"]:
        counted.update(row.get("lone_attention", {}))
    said = [f"{text} ({times})" for text, times in counted.items()]
    return "; ".join([*said, *([row["error"]] if "error" in row else [])])


def _general(reason: str) -> str:
    """Without the names of one graph's nodes."""
    return re.sub(r"_\d+\b", "", reason)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="*", help="only these; the others' rows are kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    CONTEXT.set_forkserver_preload(
        ["torch._inductor.compile_fx", "transformers", "dejavu_compile"]
    )
    from dejavu_compile.bench import write

    known = json.loads(args.out.read_text())["rows"] if args.types and args.out.exists() else []
    rows = {row["type"]: row for row in known}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(in_a_process, args.types or kinds()):
            rows[row["type"]] = row
            print(line(row), flush=True)
            ordered = [rows[kind] for kind in sorted(rows)]
            write(args.out, {"rows": ordered})
            args.page.write_text(page(ordered), encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    if row["stage"] in ("build", "eager", "crash", "timeout"):
        return f"{row['type']:<24} {row['stage']:<8} {row.get('error', '')[:120]}"
    return (
        f"{row['type']:<24} {row['stage']:<8} breaks {row.get('graph_breaks')}  lossless {row.get('error_lossless', 9):.0e}  "
        f"MLP {row.get('sites_mlp')}/{row.get('mlps')}  attention {row.get('sites_attention')}/{row.get('attentions')}  "
        f"sparse {row.get('sites_sparse')} err {row.get('error_sparse', 0):.0e} of {row.get('sparse_from_dense', 0):.0e} "
        f"{row['seconds']} s  {row.get('error', '')[:100]}"
    )


if __name__ == "__main__":
    main()
