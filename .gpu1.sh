python3 -m pip install -q --no-deps --no-build-isolation --target /tmp/site . 2>&1 | tail -1
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1
cd benchmarks
timeout 230 python3 -P decode.py --shape opt-6.7b --head-density 0.5 --modes reduce-overhead --variants inline lossless mlps side_stream --out $OUT/d67.json 2>$OUT/e1.log | tail -6
timeout 300 python3 -P decode.py --shape opt-66b --head-density 0.42 --modes reduce-overhead --variants inline lossless --out $OUT/d66.json 2>$OUT/e2.log | tail -4
cd ..; timeout 60 python3 -P -m pytest -q -p no:cacheprovider tests/kernels/interpreted.py -k "test_sum or head_sum" > $OUT/kernels.log 2>&1; tail -3 $OUT/kernels.log | cut -c1-200
