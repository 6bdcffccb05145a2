#!/usr/bin/env bash
# Unlabelled images of the place where the model is used: 84 frames of Seq05VD, tested on 71 later ones of that drive (place.yaml); the 23 labelled images
# are of other drives. Written down before its first run: proof.yaml's settings, draws 0 to 4. The question: does "best form, of the place" have a
# higher test mIoU than "supervised"? Beside it: with a full weight, and with the unlabelled images of all drives.
set -euo pipefail
cd "$(dirname "$0")/../.."

python -m cps_ray.bench methods docs/camvid/proof.yaml --split test --seeds 1 --jobs 2 --json docs/camvid/place.json --only supervised --draws 5 \
  --set data.shards=data/camvid/shards-place --variant "best form, of the place: data.unlabeled_list=docs/camvid/place.txt"

python -m cps_ray.bench methods docs/camvid/proof.yaml --split test --seeds 1 --jobs 2 --json docs/camvid/place.json --only supervised --draws 3 \
  --set data.shards=data/camvid/shards-place --variant "weight 1, of the place: cps.weight=1 data.unlabeled_list=docs/camvid/place.txt" \
  --variant "best form, of all drives:"
