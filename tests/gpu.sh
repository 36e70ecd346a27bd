#!/usr/bin/env bash
# All that decides whether the code works on a GPU: tests, training, decoding elsewhere, speed. Some minutes.
#
#     tests/gpu.sh [--cpu] [PHOTOGRAPHS [VALIDATION]]      # folders; scikit-image's photographs without
#
# --cpu runs the same commands on a CPU, as short as they can be, to test this script. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda
if [ "${1:-}" = --cpu ]; then
    device=cpu
    shift
fi
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ $device = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "error: no GPU that the PyTorch of $python can use; tests/gpu.sh --cpu tries the commands out on the CPU" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ $device = cuda ]; then
    steps=40 batch=(-bs 32) sides=(--val-size 256) speed=(--runs 10) size=(--width 768 --height 512) decoding=(--crop 256)
else
    export CUDA_TESTS_ON_CPU=1 TORCHDYNAMO_DISABLE=1 # --compile then compiles nothing, which would take minutes
    steps=2 batch=(-bs 1 --patch-size 128) sides=(--val-size 128) speed=(--runs 1) size=(--width 128 --height 128) decoding=(--crop 128 -l 2.5)
fi
if [ $# -eq 0 ]; then
    mkdir "$work/photographs"
    "$python" - "$work/photographs" <<'PYTHON'
import shutil, sys
from utils.pictures import find_images_or_samples
for path in find_images_or_samples(None):
    shutil.copy(path, sys.argv[1])
PYTHON
fi
photographs=${1:-$work/photographs}
validation=(${2:+--val "$2"})

title() { printf '\n== %s\n' "$*"; }

train() { # NAME [OPTIONS] SCRIPT ARGUMENTS: a run in its own folder
    title "training: $1"
    local name=$1 command=()
    shift
    while [ "${1%.py}" = "$1" ]; do command+=("$1") && shift; done
    "$python" ${command[@]+"${command[@]}"} "$1" -d "$photographs" ${validation[@]+"${validation[@]}"} --device $device \
        --save_path "$work/$name" --max-steps $steps --warmup 10 --amp "${batch[@]}" "${sides[@]}" "${@:2}"
}

title tests
"$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/models/test_devices.py tests/models/test_precision.py

train entropy train_vbr.py --stage entropy --keep-latents 64
train joint train_vbr.py --checkpoint "$work/entropy/model.pth.tar"
train decoder train_vbr.py --stage decoder --checkpoint "$work/joint/model.pth.tar"
train compiled train_vbr.py --checkpoint "$work/entropy/model.pth.tar" --compile
train last train_vbr.py --checkpoint "$work/entropy/model.pth.tar" --compile --patch-size 128 --last-part 0.5 --last-patch-size 256
train fp16 train_vbr.py --checkpoint "$work/entropy/model.pth.tar" --amp fp16
train readers train_vbr.py --preset depthconv --cache-gb 0 -n 2
train resumed train_vbr.py --preset depthconv --max-steps 1
train resumed train_vbr.py --preset depthconv --resume
train ms-ssim train_vbr.py --preset depthconv --type ms-ssim --patch-size 256 --val-size 256
train lae train_vbr.py --stage lae --checkpoint "$work/entropy/model.pth.tar"
if [ $device = cuda ] && [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
    train several -m torch.distributed.run --standalone --nproc-per-node=2 train_vbr.py --preset depthconv
fi
train base train_vbr.py --stage base --lambda 0.013
train map train_latent_e2e.py --high "$work/base/model.pth.tar" --low "$work/base/model.pth.tar"

title "training: patches a second, and where the host waits for the GPU"
"$python" -m utils.benchmarks.training --device $device --amp "${batch[@]}" "${speed[@]}"
"$python" -m utils.benchmarks.training --device $device --amp --compile "${batch[@]}" "${speed[@]}"

title "coding: seconds of each part"
"$python" -m utils.benchmarks.speed --device $device "${size[@]}" "${speed[@]}"

title "files decode on the other device"
picture=$(find "$photographs" -type f \( -iname '*.png' -o -iname '*.jpg' -o -iname '*.jpeg' \) | sort | head -n 1 || true)
"$python" codec_vbr.py encode "$picture" "$work/cpu.tvbr" --device cpu
"$python" codec_vbr.py encode "$picture" "$work/gpu.tvbr" --device $device
"$python" codec_vbr.py decode "$work/cpu.tvbr" "$work/cpu.png" --device $device
"$python" codec_vbr.py decode "$work/gpu.tvbr" "$work/gpu.png" --device cpu
"$python" -m utils.benchmarks.decoding -d "$picture" "${decoding[@]}" --json "$work/decoding.json"
"$python" - "$work/decoding.json" <<'PYTHON'
import json, sys
failed = [name for name, found in json.load(open(sys.argv[1])).items() if found["decoded"] < found["files"]]
sys.exit(f"error: files are not decoded under: {', '.join(failed)}" if failed else 0)
PYTHON

title "all passed on $device"
