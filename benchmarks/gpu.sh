#!/bin/sh
# Whether everything is right and fast on this machine's GPU: see benchmarks/gpu.py. --dry: in small, on the CPU.
cd "$(dirname "$0")/.." && exec "$(command -v python || command -v python3)" -m benchmarks.gpu "$@"
