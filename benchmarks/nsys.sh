#!/usr/bin/env bash
# A timeline by Nsight Systems of one call of a benchmark: which kernels ran when, and what the host did meanwhile.
#
#   benchmarks/nsys.sh kv_cache          # decoding on a naive KV cache, kernels launched one by one
#   benchmarks/nsys.sh paged_attention   # paged decode
#
# Writes runs/nsys/<topic>.nsys-rep for the viewer (nsys-ui), and prints its tables. The viewer must be as new as the
# collector: open a report of 2025.3 with nsys-ui 2025.3 or later.
set -euo pipefail
cd "$(dirname "$0")/.."
topic=${1:?which benchmark? for example: benchmarks/nsys.sh kv_cache}
out=runs/nsys/$topic
command -v nsys >/dev/null || {
  echo "nsys is not here: install Nsight Systems (package nsight-systems-cli of NVIDIA's repository), or use profiling.trace" >&2
  exit 1
}
mkdir -p runs/nsys

# The ranges come from Python, whose strings are not registered with NVTX; without this the capture never starts.
export NSYS_NVTX_PROFILER_REGISTER_ONLY=0

flags=(
  --trace=cuda,nvtx,osrt          # kernels and their launches, our ranges, the host's waiting
  --capture-range=nvtx            # record nothing before ...
  --nvtx-capture=measured         # ... this range begins (benchmarks/harness.py opens it after a warm-up)
  --capture-range-end=stop        # and stop when it ends
  --cuda-graph-trace=node         # show the kernels inside a CUDA graph, not one bar for all (costs some time)
  --sample=none --cpuctxsw=none   # no sampling of the host's stacks: the file stays small
  --force-overwrite=true
  --output="$out"
)
nsys profile "${flags[@]}" "${PYTHON:-python}" -m "benchmarks.$topic" --device cuda --nvtx
# The tables are made from an SQLite copy of the report; make it anew, for one may lie there from the run before.
nsys stats --force-export=true --report cuda_gpu_kern_sum,cuda_api_sum,nvtx_pushpop_sum "$out.nsys-rep"
