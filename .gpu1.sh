python3 -m pip install -q --no-deps --no-build-isolation --target /tmp/site . 2>&1 | tail -1
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,utilization.gpu,memory.used --format=csv
(timeout 200 python3 -P -m pytest -q -p no:cacheprovider tests/kernels/interpreted.py -k "head or attention" -x > $OUT/kernels.log 2>&1; tail -15 $OUT/kernels.log)
cd benchmarks
for v in "opt-6.7b --layers 8 --density 0.1 --heads 0.5 --variants inline side_stream" "llama-3-8b --layers 8 --heads 0.5 --variants inductor lossless inline --attention-only --length 4096"; do
timeout 150 python3 -P breakdown_draft.py --shape $v 2>$OUT/err.log || tail -5 $OUT/err.log
done
timeout 200 python3 -P decode.py --shape opt-6.7b --head-density 0.5 --modes reduce-overhead default --variants lossless inline side_stream --out $OUT/d67.json 2>$OUT/err2.log | tail -8 || tail -5 $OUT/err2.log
