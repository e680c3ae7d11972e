python3 -m pip install -q --no-deps --no-build-isolation --target /tmp/site . 2>&1 | tail -1
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1
cd benchmarks
timeout 75 python3 -P ops.py --shapes 4096 --slots 512 --sweep sum head_sum attention --out $OUT/o1.json 2>$OUT/e1.log | grep -v cublas || tail -5 $OUT/e1.log
timeout 40 python3 -P ops.py --shapes 4096 --slots 4096 --group 4 --sweep attention --out $OUT/o2.json 2>$OUT/e2.log | grep -v "select\|gemv\|cublas\|chain\|rows" || tail -5 $OUT/e2.log
timeout 70 python3 -P ops.py --shapes 9216 --slots 4096 --sweep sum head_sum attention --out $OUT/o3.json 2>$OUT/e3.log | grep -v cublas || tail -5 $OUT/e3.log
timeout 110 python3 -P decode.py --shape opt-6.7b --layers 8 --head-density 0.5 --repeats 8 --breakdown --modes reduce-overhead --variants inline side_stream combo --out $OUT/a.json > $OUT/log.txt 2>$OUT/err.log || tail -5 $OUT/err.log; grep -v "^{" $OUT/log.txt
