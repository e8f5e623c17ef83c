export PYTHONPATH=/tmp/site:. PYTHONUNBUFFERED=1
TIMEFORMAT="wall %R"
R="python3 -m kqprefill"
rm -rf ~/.cache/kqprefill
python3 -m kqprefill synth qwen3-8b:Q4_K_M /tmp/m.gguf
echo "cold compile:"; time $R run /tmp/m.gguf --tokens 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16 --backend cuda -v
for i in 1 2 3 4; do time $R run /tmp/m.gguf --tokens 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16 --backend cuda -v; done
$R run examples/tiny-qwen3.gguf --tokens 72,101,108,108,111 --backend cuda
for i in 1 2 3 4; do time $R run examples/tiny-qwen3.gguf --tokens 72,101,108,108,111 --backend cuda; done
