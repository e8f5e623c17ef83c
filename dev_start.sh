export PYTHONPATH=/tmp/site:. PYTHONUNBUFFERED=1
python3 -m kqprefill run examples/tiny-qwen3.gguf --tokens 72,101,108,108,111 --backend cuda
R="python3 -m kqprefill"
for i in 1 2 3; do s=$(date +%s.%N); eval $R run examples/tiny-qwen3.gguf --tokens 72,101,108,108,111 --backend cuda; e=$(date +%s.%N); echo "example wall $(echo "$e - $s" | bc)"; done
T0=$(date +%s.%N) python3 dev_start.py examples/tiny-qwen3.gguf --tokens 72,101,108,108,111 --backend cuda; 
eval $R synth qwen3-8b:Q4_K_M /tmp/m.gguf; ls -l /tmp/m.gguf; cat /tmp/m.gguf > /dev/null
for i in 1 2 3; do s=$(date +%s.%N); eval $R run /tmp/m.gguf --tokens 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16 --backend cuda -v; e=$(date +%s.%N); echo "5GB wall $(echo "$e - $s" | bc)"; done
T0=$(date +%s.%N) python3 dev_start.py /tmp/m.gguf --tokens 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16 --backend cuda
