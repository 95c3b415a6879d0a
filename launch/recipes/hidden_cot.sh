#!/usr/bin/env bash
# The Hidden-CoT paper, from the raw data sets to the scored student and its Hugging Face folder.
#
#   launch/recipes/hidden_cot.sh --dry-run            every command, its disk and what is missing here
#   launch/recipes/hidden_cot.sh --dry-run --topology=h100:1x8       and the GPU hours of the training
#   launch/recipes/hidden_cot.sh                      everything; the same command again goes on
#   launch/recipes/hidden_cot.sh --without-missing    goes on without the data sets that are missing
#
# Edit two lines: where the inputs are, and where the results go.
RAW=${RAW:-raw}
OUT=${OUT:-data/hidden_cot}
# RAW has these, as folders or links; docs/how-to/data_sets.md says where each data set is had:
#   scannet/    scans/ and the official lists of splits
#   3d-front/   3D-FRONT/ and 3D-FUTURE-model/
#   scanqa/  sqa3d/
#   vggt/       a checkout of VGGT with its environment in .venv
#   LLaVA-3D/   a checkout of LLaVA-3D with its environment in .venv and ScanNet's videos in videos/
#   tokenizer/  the tokenizer of LLaVA-3D-7B as save_pretrained writes it, 32,000 tokens
# Further environment variables: VGGT_PYTHON and LLAVA_PYTHON (interpreters), VIDEOS (the videos of
# LLaVA-3D), VIEWS and GRID (of a scene), TRAIN (fields added to every training, such as
# "--config.train.steps=100"), GEODE (the command geode-jax).
source "$(dirname "$0")/steps.sh"

VIEWS=${VIEWS:-8}
GRID=${GRID:-37 37} # VGGT's patches of 14 pixels in pictures of 518 x 518
VGGT_PYTHON=${VGGT_PYTHON:-$RAW/vggt/.venv/bin/python}
LLAVA_PYTHON=${LLAVA_PYTHON:-$RAW/LLaVA-3D/.venv/bin/python}
VIDEOS=${VIDEOS:-$RAW/LLaVA-3D/videos}
read -ra grid <<<"$GRID"
read -ra vggt_options <<<"${VGGT_OPTIONS:-}"
read -ra llava_options <<<"${LLAVA_OPTIONS:-}"

input scannet "$RAW/scannet/scans" 'all scenes with a sensor; then only 3D-FRONT is learned'
input 3d-front "$RAW/3d-front/3D-FRONT" 'all synthetic houses; then only ScanNet is learned'
input scanqa "$RAW/scanqa" "people's questions about ScanNet; questions measured from boxes remain"
input sqa3d "$RAW/sqa3d" 'questions that depend on a situation'
required vggt "$VGGT_PYTHON" 'the features that the student sees; nothing can be trained'
input llava-3d "$LLAVA_PYTHON" "the teacher's answers and logits; the student learns the true answers"
required tokenizer "$RAW/tokenizer/tokenizer.json" 'the vocabulary; nothing can be trained'
inputs_end

if ! have scannet && ! have 3d-front; then
    echo "error: there is no scene to train on: neither scannet nor 3d-front" >&2
    exit 2
fi

# One VGGT token is 2,048 numbers of two bytes.
megabytes=$(awk -v v="$VIEWS" -v r="${grid[0]}" -v c="${grid[1]}" 'BEGIN { print v * r * c * 4096 / 1e6 }')
scenes=$(($(entries "$RAW/scannet/scans") + $(entries "$RAW/3d-front/3D-FRONT")))

parts=()
for source in scannet 3d-front; do
    if ! have "$source"; then continue; fi
    step "scenes of $source" "$OUT/$source/manifest.json" "a tenth of the step after it" \
        "${GEODE[@]}" prepare --source "$source" --root "$RAW/$source" --out "$OUT/$source" \
        --views "$VIEWS" --grid "${grid[@]}"
    step "VGGT's features of $source" "$OUT/$source-vggt/manifest.json" \
        "$(gigabytes "$scenes" "$megabytes") with the other data set" \
        "$VGGT_PYTHON" "$THIRD_PARTY/vggt/export_vggt.py" --export "$OUT/$source" \
        --out "$OUT/$source-vggt" "${vggt_options[@]}"
    parts+=(--export "$OUT/$source-vggt")
done

# Sec. III-E: "split into 80% training samples and 20% validation samples".
export=$OUT/scenes
step 'one export of all scenes, 80 % of them for training' "$export/manifest.json" 'links, no copies' \
    "${GEODE[@]}" merge "${parts[@]}" --out "$export" --split 80/20

for source in scanqa sqa3d; do
    if ! have "$source" scannet; then continue; fi
    step "questions of $source" "$OUT/$source/manifest.json" 'links, no copies' \
        "${GEODE[@]}" prepare --source "$source" --root "$RAW/$source" --scenes "$export" \
        --out "$OUT/$source"
    export=$OUT/$source
done

reference=truth
if have llava-3d; then
    reference=teacher
    step "LLaVA-3D's answers, logits and features" "$OUT/taught/manifest.json" \
        "$(gigabytes "$scenes" "$megabytes"), and the same again for its features" \
        "$LLAVA_PYTHON" "$THIRD_PARTY/llava3d/export_llava3d.py" --export "$export" --out "$OUT/taught" \
        --videos "$VIDEOS" --tokenizer "$RAW/tokenizer" --features 2d "${llava_options[@]}"
    export=$OUT/taught
fi

step 'targets of the terms that LLaVA-3D does not give' "$OUT/targets/manifest.json" \
    'links of the scenes, new files of the teacher' \
    "${GEODE[@]}" teacher --export "$export" --out "$OUT/targets"
export=$OUT/targets

step 'check of the whole export' "$OUT/validated.txt" 'a page' \
    bash -c '"${@:2}" | tee "$1.part" && mv "$1.part" "$1"' check "$OUT/validated.txt" \
    "${GEODE[@]}" validate "$export"

common=(--config.data.export="$export" --config.tokenizer="$RAW/tokenizer"
    --config.eval.reference="$reference" --config.eval.blind="$OUT/blind")
train hidden_cot:full,vision=off "$OUT/blind" "${common[@]}"
train hidden_cot:full "$OUT/run" "${common[@]}"
step 'PyTorch folder of the student' "$OUT/student/config.json" 'parameters, 3 GB in bfloat16' \
    "${GEODE[@]}" convert export --workdir "$OUT/run" --out "$OUT/student"

printf '\nscores and report: %s\nstudent: %s\n' "$OUT/run/report.html" "$OUT/student"
