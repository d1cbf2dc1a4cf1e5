#!/bin/bash
# What a first run on a GPU should show, in about 8 minutes: bash bench/gpu.sh [cuda|cpu] [folder of the results]
# On a CPU the same at a small size, to try the script.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda} out=${2:-logs/gpu_check}
if [ "$device" = cpu ]; then
    same=3 repeated=3 recipe=demo batch=2 size="96 96" crf="96 128" seconds=0.1
else
    same=20 repeated=200 recipe=voc batch=4 size="448 448" crf="375 500" seconds=2
fi
mkdir -p "$out"
[ -d data/demo ] || python tools/make_demo_data.py

train() { # name, overrides: SeCo on the demo set with every loss on from the first step
    python scripts/train_voc.py config=configs/seco/demo.yaml work_dir="$out/$1" train.resume=never train.log_every=1 \
        train.eval_every=1000 data.val_set=null data.num_workers=0 method.loss_weights.{ptc=0.3,lil=0.1,lig=0.1,seg=0.12,reg=0.05} "${@:2}"
}

echo "== the lattice and the changes of pictures on the CPU and on the GPU"
python -m pytest -q tests/ops/test_lattice.py tests/utils/test_colour.py

echo "== $same steps in float32 on the CPU and on $device: losses differ by at most 1e-4"
train on_cpu device=cpu train.steps=$same train.precision=fp32
train on_device device="$device" train.steps=$same train.precision=fp32
python bench/compare_runs.py losses "$out/on_cpu" "$out/on_device"

echo "== $repeated deterministic steps twice: equal to the bit"
train first device="$device" train.steps=$repeated train.deterministic=true
train again device="$device" train.steps=$repeated train.deterministic=true
python bench/compare_runs.py weights "$out/first" "$out/again"

for method in seco toco; do
    echo "== a step of $method, and the views of its batch"
    python bench/run.py train --config "configs/$method/$recipe.yaml" --device "$device" --batch $batch --size $size \
        --seconds $seconds --out "$out/$method.json"
    python bench/run.py data --config "configs/$method/$recipe.yaml" --device "$device" --batch $batch --seconds $seconds \
        --out "$out/${method}_views.json"
done
echo "== DenseCRF and the energy loss"
python bench/run.py crf --device "$device" --batch $((2 * batch)) --size $crf --seconds $seconds --out "$out/crf.json"
python bench/run.py energy --device "$device" --batch $batch --size 224 224 --seconds $seconds --out "$out/energy.json"
