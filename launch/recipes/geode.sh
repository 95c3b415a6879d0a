#!/usr/bin/env bash
# GEODE, from the raw data sets and pretrained models to VSI-Bench's score and the Hugging Face folder.
#
#   launch/recipes/geode.sh --dry-run            every command, its disk and what is missing here
#   launch/recipes/geode.sh --dry-run --topology=h100:1x8       and the GPU hours of the training
#   launch/recipes/geode.sh                      everything; the same command again goes on
#   launch/recipes/geode.sh --without-missing    goes on without the data sets that are missing
#
# Edit two lines: where the inputs are, and where the results go.
RAW=${RAW:-raw}
OUT=${OUT:-data/geode}
# RAW has these, as folders or links; docs/how-to/data_sets.md says where each data set is had:
#   scannet/  scannetpp/  arkitscenes/             the scenes of stages 0 to 2
#   cambrian-alignment/  s-mit/                    captions, with their pictures and videos in images/
#   vica322k/  vica-thinking/  vsi590k/  vlm3r/    questions about the scenes
#   vsi-bench/                                     the benchmark with its videos
#   vggt/  sonata/                                 checkouts with their environments in .venv
#   Qwen2.5-1.5B-Instruct/  InternViT-300M-448px-V2_5/     pretrained models
# Further environment variables: VGGT_PYTHON and SONATA_PYTHON (interpreters), VIEWS and GRID (of a
# scene), TRAIN (fields added to every training), GEODE (the command geode-jax).
source "$(dirname "$0")/steps.sh"

VIEWS=${VIEWS:-16} # Table 2
GRID=${GRID:-37 37} # VGGT's patches of 14 pixels in pictures of 518 x 518
VGGT_PYTHON=${VGGT_PYTHON:-$RAW/vggt/.venv/bin/python}
SONATA_PYTHON=${SONATA_PYTHON:-$RAW/sonata/.venv/bin/python}
QWEN=$RAW/Qwen2.5-1.5B-Instruct INTERNVIT=$RAW/InternViT-300M-448px-V2_5
read -ra grid <<<"$GRID"
read -ra vggt_options <<<"${VGGT_OPTIONS:-}"
read -ra sonata_options <<<"${SONATA_OPTIONS:-}"

input scannet "$RAW/scannet/scans" 'the scenes of most questions; little is left to learn'
input scannetpp "$RAW/scannetpp" 'questions of ViCA-322K, VLM-3R and VSI-590K about its scenes'
input arkitscenes "$RAW/arkitscenes" 'questions of ViCA-322K and VSI-590K about its scenes'
input cambrian-alignment "$RAW/cambrian-alignment/jsons" '250k captions of pictures, stage 0'
input s-mit "$RAW/s-mit" '120k captions of videos, stage 0'
input vica322k "$RAW/vica322k" '281k answers of stage 0 and 40k of stage 1'
input vica-thinking "$RAW/vica-thinking" '2.7k rationales of stage 1'
input vsi590k "$RAW/vsi590k" '590k questions of stage 2'
input vlm3r "$RAW/vlm3r" '330k questions of stage 2'
input vsi-bench "$RAW/vsi-bench" 'the score, and the list of scenes that must not be trained on'
required vggt "$VGGT_PYTHON" 'the clouds from which Sonata makes the points that the rationale module reads'
required sonata "$SONATA_PYTHON" 'the points that the rationale module reads; stage 1 cannot be trained'
required Qwen2.5 "$QWEN/config.json" 'the pretrained decoder; nothing can be trained'
required InternViT "$INTERNVIT/config.json" 'the pretrained vision encoder; nothing can be trained'
inputs_end

if ! have scannet && ! have scannetpp && ! have arkitscenes; then
    echo "error: there is no room to train on: none of scannet, scannetpp and arkitscenes" >&2
    exit 2
fi

# Pictures of 448 x 448, and VGGT's tokens of 2,048 numbers of two bytes.
megabytes=$(awk -v v="$VIEWS" -v r="${grid[0]}" -v c="${grid[1]}" \
    'BEGIN { print v * (448 * 448 * 3 + r * c * 4096) / 1e6 }')

# with_points NAME COUNT: VGGT's clouds and Sonata's points of the export NAME, as NAME-points.
with_points() {
    local count=$2
    step "VGGT's clouds of $1" "$OUT/$1-vggt/manifest.json" "$(gigabytes "$count" "$megabytes")" \
        "$VGGT_PYTHON" "$THIRD_PARTY/vggt/export_vggt.py" --export "$OUT/$1" --out "$OUT/$1-vggt" \
        "${vggt_options[@]}"
    step "Sonata's points of $1" "$OUT/$1-points/manifest.json" "$(gigabytes "$count" "$megabytes")" \
        "$SONATA_PYTHON" "$THIRD_PARTY/sonata/export_sonata.py" --export "$OUT/$1-vggt" \
        --out "$OUT/$1-points" "${sonata_options[@]}"
}

# questions STAGE SOURCE ARGUMENT...: adds a data set to the export of a stage, `export`.
questions() {
    local stage=$1 source=$2
    shift 2
    if ! have "$source"; then return; fi
    step "stage $stage: questions of $source" "$OUT/stage$stage-$source/manifest.json" \
        'links, no copies' "${GEODE[@]}" prepare --source "$source" --root "$RAW/$source" \
        --scenes "$export" --out "$OUT/stage$stage-$source" "$@"
    export=$OUT/stage$stage-$source
}

# --- The benchmark, whose scenes must not be trained on -------------------------------------------

exclude=()
if have vsi-bench; then
    step 'videos of VSI-Bench' "$OUT/vsi-bench/manifest.json" "$(gigabytes 288 "$megabytes")" \
        "${GEODE[@]}" prepare --source vsi-bench --root "$RAW/vsi-bench" --out "$OUT/vsi-bench" \
        --views "$VIEWS" --grid "${grid[@]}"
    step 'list of its scenes' "$OUT/vsi-bench-scenes.txt" 'a page' \
        bash -c '"${@:2}" > "$1.part" && mv "$1.part" "$1"' list "$OUT/vsi-bench-scenes.txt" \
        "${GEODE[@]}" scenes --export "$OUT/vsi-bench"
    exclude=(--exclude-scenes "$OUT/vsi-bench-scenes.txt" --allow-missing)
    with_points vsi-bench 288
fi

# --- The scenes -----------------------------------------------------------------------------------

# listed FOLDER: true if the benchmark has a room of which there is a scan below the folder.
listed() {
    $dry || find -L "$1" -maxdepth 3 -printf '%f\n' | sed 's/_[0-9][0-9]$//' |
        grep -qxFf <(sed 's/_[0-9][0-9]$//' "$OUT/vsi-bench-scenes.txt")
}

rooms=() own=()
for source in scannet scannetpp arkitscenes; do
    if ! have "$source"; then continue; fi
    excluded=()
    if ((${#exclude[@]})) && listed "$RAW/$source"; then excluded=("${exclude[@]}"); fi
    folder=$RAW/$source
    if [[ $source == scannet ]]; then folder=$RAW/scannet/scans; fi
    step "scenes of $source" "$OUT/$source/manifest.json" "a tenth of the step after it" \
        "${GEODE[@]}" prepare --source "$source" --root "$RAW/$source" --out "$OUT/$source" \
        --views "$VIEWS" --grid "${grid[@]}" "${excluded[@]}"
    with_points "$source" "$(entries "$folder")"
    rooms+=(--export "$source=$OUT/$source-points")
    own+=("$source=0")
done
pictures=()
for source in cambrian-alignment s-mit; do
    if ! have "$source"; then continue; fi
    step "pictures of $source" "$OUT/$source/manifest.json" \
        "$(gigabytes "$(entries "$RAW/$source/images")" 0.6) for each of its views" \
        "${GEODE[@]}" prepare --source images --part files --root "$RAW/$source/images" \
        --out "$OUT/$source" \
        --views "$VIEWS" --grid "${grid[@]}"
    pictures+=(--export "$OUT/$source")
done
step 'one export of all scenes' "$OUT/scenes/manifest.json" 'links, no copies' \
    "${GEODE[@]}" merge "${rooms[@]}" "${pictures[@]}" --out "$OUT/scenes"

# --- What each stage learns (Sec. 3.1) ------------------------------------------------------------

export=$OUT/scenes
questions 0 cambrian-alignment
questions 0 s-mit
questions 0 vica322k --part base
stage0=$export export=$OUT/scenes
questions 1 vica322k --part complex
questions 1 vica-thinking
stage1=$export export=$OUT/scenes
questions 2 vsi590k
questions 2 vlm3r
stage2=$export

# --- Training -------------------------------------------------------------------------------------

# The questions that `prepare` measures from boxes are not in the paper. Stage 2 keeps them, because
# no data set of the paper asks for a box.
without_own=$(IFS=, && echo "${own[*]}")
train geode_align:full "$OUT/runs/align" --config.data.export="$stage0" --config.tokenizer="$QWEN" \
    --config.init_from="$QWEN,$INTERNVIT" --config.data.fraction=s-mit=0.25,cambrian-alignment=0.1 \
    --config.data.mixture="$without_own" --config.train.epochs="$(passes "$stage0" 4)"
train geode_drm:full "$OUT/runs/drm" --config.data.export="$stage1" \
    --config.init_from="$OUT/runs/align" --config.data.mixture="$without_own" \
    --config.train.epochs="$(passes "$stage1" 4)"
joint=(--config.data.export="$stage2" --config.eval.blind="$OUT/runs/blind"
    --config.train.epochs="$(passes "$stage2" 4)")
train geode_joint:full,vision=off "$OUT/runs/blind" --config.init_from="$OUT/runs/align" "${joint[@]}"
train geode_joint:full "$OUT/runs/joint" --config.init_from="$OUT/runs/drm" "${joint[@]}"

# --- Score and weights ----------------------------------------------------------------------------

if have vsi-bench; then
    step "VSI-Bench, blind" "$OUT/runs/blind/vsi-bench.json" 'a page' \
        "${GEODE[@]}" evaluate vsi --workdir "$OUT/runs/blind" --export "$OUT/vsi-bench-points" \
        --out "$OUT/runs/blind/vsi-bench.json"
    step "VSI-Bench" "$OUT/runs/joint/vsi-bench.json" 'a page' \
        "${GEODE[@]}" evaluate vsi --workdir "$OUT/runs/joint" --export "$OUT/vsi-bench-points" \
        --blind "$OUT/runs/blind/vsi-bench_predictions.jsonl" --out "$OUT/runs/joint/vsi-bench.json"
fi
step 'Hugging Face folder of the model' "$OUT/model/config.json" 'parameters, 4 GB in bfloat16' \
    "${GEODE[@]}" convert export --workdir "$OUT/runs/joint" --out "$OUT/model"

printf '\nscores: %s\nmodel: %s\n' "$OUT/runs/joint/vsi-bench.json" "$OUT/model"
