export PYTHONPATH=/tmp/site:. PYTHONUNBUFFERED=1
timeout 40 python3 dev_sweep2.py > $OUT/sweep.log 2>&1; grep -v "^T=" $OUT/sweep.log | tail -n 12; cp kqprefill/backends/cuda/kernels.py $OUT/
LENGTHS=16,128,512,2048,8192 timeout 60 .ci/gpu bench > $OUT/bench.log 2>&1; grep -E "ratio|^T=" $OUT/bench.log
timeout 45 python3 -m pytest -q -m gpu tests/test_cuda_ops.py tests/test_contract.py -k "every_tile or bits or (auto and 129)" > $OUT/tests.log 2>&1; grep -E "^(E  |FAILED)" $OUT/tests.log | cut -c1-160 | head -n 12; tail -n 1 $OUT/tests.log
for t in racecheck memcheck; do
timeout ${1:-60} compute-sanitizer --tool $t python3 -m pytest -q -x -m gpu tests/test_cuda_ops.py -k "(every_tile and (linear and 256 or gated and 256 or 64x1x2)) or (auto and 129 and (grouping or one))" > $OUT/$t.log 2>&1; echo "$t exit $?"; tail -n 3 $OUT/$t.log; grep -E "Error:|Warning:|hazard" $OUT/$t.log | cut -c1-140 | sort | uniq -c | sort -rn | head -5
done
