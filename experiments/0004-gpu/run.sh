#!/usr/bin/env bash
# Speed of pretraining on one NVIDIA GPU, and PyTorch's on the same card: `experiments/0004-gpu/run.sh [OUT]`.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/0004-gpu}
vmm=${VMM:-.venv/bin/vmm}
if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "no NVIDIA GPU here: nothing was measured; run this where there is one" >&2
    exit 2
fi
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader | tee "$out/gpu.txt"

# The kernel of attention that is chosen on a GPU, against plain attention.
VMM_TEST_PLATFORMS=cuda "${vmm%vmm}python" -m pytest -q -p no:xdist tests/test_kernels.py -k cudnn 2>&1 | tee "$out/kernels.txt" || true

whole="trunk.encoders.video.remat=False trunk.encoders.video.scan=False"
masked="$whole objectives.pixels.remat=False objectives.pixels.scan=False"
for batch in 64 128 256; do
    "$vmm" bench step configs/pretrain_videomae.py:B $masked batch=$batch --json "$out/videomae-B-$batch.json" --trace "$out/trace-B-$batch"
    "$vmm" bench step configs/pretrain_videomae.py:L $masked batch=$batch --json "$out/videomae-L-$batch.json"
done
"$vmm" bench step configs/pretrain_siglip_video.py:B $whole batch=64 --json "$out/siglip-B-64.json"
for size in base large; do
    "$vmm" bench peers --device gpu --size $size --batch 64 --rounds 10 --json "$out/peers-$size.json"
done
