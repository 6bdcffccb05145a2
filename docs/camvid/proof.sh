#!/usr/bin/env bash
# The comparison on CamVid's test, written down before the first run of it: draws, seed, steps, arms. proof.yaml holds rates, weights and losses,
# which were chosen on val of draw 100 (select.sh); nothing was chosen by draws 0 to 4. Every run is in proof.json as it ends, and
# this script goes on from there. Arms are never chosen, stopped or left out by their scores on test.
#
# The question: does "best form" have a higher test mIoU (network a, average of the weights, step 1000) than "supervised"?
# The answer: the 95 % t-interval of the paired difference over draws 0 to 4. All else is told beside it.
set -euo pipefail
cd "$(dirname "$0")/../.."

on_test() {  # on_test DRAWS [further arguments]
  python -m cps_ray.bench methods docs/camvid/proof.yaml --split test --seeds 1 --jobs 2 --json docs/camvid/proof.json --only supervised \
    --draws "$@"
}
LONG="schedule.steps=3000"

# 1. The question itself: 23 labels (1/16), 5 draws.
on_test 5 --variant "best form:"

# 2. Half as many labels.
on_test 3 --variant "supervised, 11 labels: method=supervised data.labeled=11" --variant "best form, 11 labels: data.labeled=11"

# 3. Three times the steps, one pair.
on_test 1 --variant "supervised, 3000 steps: method=supervised $LONG" --variant "best form, 3000 steps: $LONG"

# 4. Controls of the best form, 3 draws: pseudo labels of other images, true masks as pseudo labels, a single network that labels for itself; and
#    what all 367 masks are worth.
on_test 3 --only "shuffled control" oracle "upper bound" \
  --variant "self-training, as the best form: method=fixmatch fixmatch.view=weak fixmatch.confidence=0"

# 5. Twice as many labels (1/8).
on_test 3 --variant "supervised, 46 labels: method=supervised data.labeled=46" --variant "best form, 46 labels: data.labeled=46"

# 6. CPS as in the paper: full weight, after a ramp from the first step, by the networks themselves.
FROM_START="method=cps cps.weight=1 cps.start=0 cps.ramp=0.3 cps.teacher=network cps.class_weights=null"
on_test 5 --variant "cps from the start: $FROM_START cps.mix=none cps.images=all" --variant "cps + cutmix from the start: $FROM_START"

# 7. The best form along its weight: 6 values, 2 draws; 0.3 is the best form itself.
on_test 2 --variant "weight 0.03: cps.weight=0.03" --variant "weight 0.1: cps.weight=0.1" --variant "weight 1: cps.weight=1" \
  --variant "weight 3: cps.weight=3" --variant "weight 10: cps.weight=10"

# 8. Methods with one network, each with the remedies of the best form (start, ramp, weights of the classes), on 5 draws; mean teacher on 3.
#    Weights of their losses: the best val mIoU of draw 100 among 0.3 and 1 (fixmatch, unimatch), 1, 10 and 100 (mean teacher). Where these
#    trainings are in selection-methods.json, the values are written here, and not before.
