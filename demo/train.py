"""Train the two small real decoders that the demo and the tests use, and larger ones to measure quality on.

    python demo/train.py corpus  --out build/decoders            # tokenizer, tokens, held-out text
    python demo/train.py decoder --out build/decoders --name opt-python-8m --minutes 5

    python demo/train.py corpus  --out build/large --vocabulary 16384
    python demo/train.py decoder --out build/large --name opt-python-107m --minutes 5

The corpus is the Python source found on the machine: every distinct .py file of site-packages and of
the standard library. Two shares of the standard library never enter training: one to calibrate on
(`calibration.txt`), one to test on (`heldout.txt`); a file belongs to a share by the hash of its
text, so the same machine gives the same shares.

Needs one GPU. On an H200, five minutes a decoder (three at a time) gave the figures in the model cards.
"""

import argparse
import hashlib
import json
import math
import site
import sys
import sysconfig
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

CONTEXT = 512
END = "<|endoftext|>"


def opt(vocabulary: int, hidden: int, ffn: int, layers: int, heads: int) -> OPTForCausalLM:
    """OPT: ReLU MLP with biases, pre-norm, tied embeddings."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary, hidden_size=hidden, ffn_dim=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, word_embed_proj_dim=hidden, max_position_embeddings=CONTEXT,
            dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


def llama(vocabulary: int, hidden: int, ffn: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Llama: SwiGLU MLP, grouped-query attention (2 query heads a group), tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


def nemotron(
    vocabulary: int, hidden: int, ffn: int, layers: int, heads: int
) -> NemotronForCausalLM:
    """Nemotron: ReLU^2 MLP without biases, grouped-query attention (2 query heads a group), tied embeddings."""
    return NemotronForCausalLM(
        NemotronConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


DECODERS = {
    "opt-python-8m": lambda vocabulary: opt(vocabulary, 192, 1536, 9, 3),
    "llama-python-8m": lambda vocabulary: llama(vocabulary, 256, 768, 8, 4),
    "opt-python-107m": lambda vocabulary: opt(vocabulary, 768, 3584, 12, 12),
    "llama-python-105m": lambda vocabulary: llama(vocabulary, 768, 2560, 12, 12),
    "nemotron-python-102m": lambda vocabulary: nemotron(vocabulary, 768, 3712, 12, 12),
}


# --- corpus ----------------------------------------------------------------------------------------


def read_source(path: Path) -> str | None:
    """The text of a source file worth learning from, else None."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if 200 < len(text) < 400_000 else None


def share_of(text: str, in_stdlib: bool) -> str:
    """`train`, `calibration` or `heldout`, by the hash of the text."""
    bucket = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100
    if in_stdlib and bucket < 12:
        return "heldout" if bucket < 6 else "calibration"
    return "train"


def collect() -> dict[str, list[str]]:
    """Every distinct Python file on the machine, by share."""
    stdlib = Path(sysconfig.get_paths()["stdlib"]).resolve()
    roots = [stdlib, *map(Path, site.getsitepackages()), Path(torch.__file__).parents[1]]
    shares: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    seen: set[bytes] = set()
    for path in sorted({p.resolve() for root in roots for p in root.rglob("*.py")}):
        text = read_source(path)
        if text is None or (digest := hashlib.sha256(text.encode()).digest()) in seen:
            continue
        seen.add(digest)
        in_stdlib = path.is_relative_to(stdlib) and not {"site-packages", "dist-packages"} & set(
            path.parts
        )
        shares[share_of(text, in_stdlib)].append(text)
    return shares


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a tenth of the training files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts[::10], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token="<|pad|>",
        model_max_length=CONTEXT,
    )  # fmt: skip


_tokenizer: Tokenizer | None = None


def _load_tokenizer(path: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.from_file(path)


def _encode(texts: list[str]) -> np.ndarray:
    assert _tokenizer is not None
    return np.concatenate(
        [np.array([0, *_tokenizer.encode(t).ids], dtype=np.uint16) for t in texts]
    )


def make_corpus(out: Path, vocabulary: int) -> None:
    """Write `tokenizer/`, `train.npy`, `calibration.txt`, `heldout.txt` and `corpus.json` under `out`."""
    shares = collect()
    tokenizer = train_tokenizer(shares["train"], vocabulary)
    tokenizer.save_pretrained(out / "tokenizer")
    for share in ("calibration", "heldout"):
        (out / f"{share}.txt").write_text(END.join(shares[share])[:900_000], encoding="utf-8")
    texts = shares["train"]
    order = np.random.default_rng(0).permutation(len(texts))
    chunks = [[texts[i] for i in part] for part in np.array_split(order, 256)]
    with Pool(
        initializer=_load_tokenizer, initargs=(str(out / "tokenizer/tokenizer.json"),)
    ) as pool:
        tokens = np.concatenate(pool.map(_encode, chunks))
    np.save(out / "train.npy", tokens)
    summary = {
        "files": {share: len(texts) for share, texts in shares.items()},
        "train_megabytes": sum(map(len, texts)) / 1e6,
        "train_tokens": len(tokens),
    }
    (out / "corpus.json").write_text(json.dumps(summary, indent=1))
    print(summary, flush=True)


# --- training --------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Next-token perplexity over non-overlapping windows of CONTEXT tokens."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = 0.0
    for batch in windows.split(32):
        logits = model(input_ids=batch.cuda(), use_cache=False).logits.float()
        total += F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten().cuda(), reduction="sum"
        ).item()
    return math.exp(total / (windows.shape[0] * (CONTEXT - 1)))


def train(out: Path, name: str, minutes: float, batch: int, peak_lr: float) -> None:
    """AdamW, cosine over the wall-clock budget; saves a bf16 folder that `from_pretrained` loads."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokens = torch.from_numpy(np.load(out / "train.npy").astype(np.int32)).cuda()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    model = DECODERS[name](len(tokenizer)).cuda()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=peak_lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip

    @torch.compile
    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    generator = torch.Generator("cuda").manual_seed(0)
    span = torch.arange(CONTEXT, device="cuda")

    def sample() -> torch.Tensor:
        starts = torch.randint(
            len(tokens) - CONTEXT, (batch, 1), device="cuda", generator=generator
        )
        return tokens[starts + span].long()

    loss_of(sample()).backward()  # compile outside the budget
    optimizer.zero_grad(set_to_none=True)
    log, step, start = [], 0, time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        lr = peak_lr * min((step + 1) / 300, max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(sample())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0:
            log.append({"step": step, "seconds": time.monotonic() - start, "loss": loss.item()})
            print(name, log[-1], flush=True)
        step += 1

    heldout = torch.tensor(tokenizer((out / "heldout.txt").read_text())["input_ids"])
    model.eval().to(torch.bfloat16)
    report = {
        "name": name, "steps": step, "tokens_seen": step * batch * CONTEXT, "minutes": minutes,
        "parameters": model.num_parameters(), "heldout_perplexity_bf16": perplexity(model, heldout),
        "heldout_tokens": len(heldout), "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__, "log": log,
    }  # fmt: skip
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    (out / name / "training.json").write_text(json.dumps(report, indent=1))
    print({k: v for k, v in report.items() if k != "log"}, flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["corpus", "decoder"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", choices=DECODERS, default="opt-python-8m")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the corpus' tokenizer")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "corpus":
        make_corpus(args.out, args.vocabulary)
    else:
        train(args.out, args.name, args.minutes, args.batch, args.lr)


if __name__ == "__main__":
    sys.exit(main())
