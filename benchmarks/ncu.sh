#!/usr/bin/env bash
# The hardware's counters of each kernel of a benchmark, by Nsight Compute: how near it comes to which limit, and why.
#
#   benchmarks/ncu.sh kv_cache          # the kernels of a decode step on a naive KV cache
#   benchmarks/ncu.sh paged_attention   # paged decode
#
# Writes runs/ncu/<topic>.ncu-rep for the viewer (ncu-ui, as new as ncu or newer), its raw page as a table, and the columns
# of that which tformer_lib.profiling.read_counters reads (runs/ncu/<topic>.csv). Each kernel is run again for every group of counters ("passes"), alone and
# with cold caches: the times are those of a kernel by itself, and say nothing about the gaps between kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
topic=${1:?which benchmark? for example: benchmarks/ncu.sh paged_attention}
kernels=${2:-.*}                      # a regular expression for the kernels' names
most=${3:-20}                         # how many kernels to look at
out=runs/ncu/$topic
command -v ncu >/dev/null || { echo "ncu is not here: install Nsight Compute, which comes with the CUDA toolkit" >&2; exit 1; }
mkdir -p runs/ncu

flags=(
  --nvtx --nvtx-include measured/     # only inside this push/pop range (the slash says push/pop)
  --kernel-name "regex:$kernels"
  --launch-count "$most"
  --clock-control none                # leave the clocks alone: by default ncu locks them to the base rate, and on a
                                      # machine that is shared you may not
  --cache-control all                 # empty the caches before each pass, so that passes agree
  --section SpeedOfLight --section Occupancy --section LaunchStats --section MemoryWorkloadAnalysis
  --section WarpStateStats --section ComputeWorkloadAnalysis
  --force-overwrite --export "$out"
)
ncu "${flags[@]}" "${PYTHON:-python}" -m "benchmarks.$topic" --device cuda --nvtx
ncu --import "$out.ncu-rep" --csv --page raw >"$out-raw.csv"
"${PYTHON:-python}" -c "from tformer_lib.profiling import shorten_counters as s; s('$out-raw.csv', '$out.csv')"
echo "wrote $out.ncu-rep and $out.csv"
