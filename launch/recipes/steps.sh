# What the recipes share; they source this file, which is not run by itself.
#
# A recipe names what it needs with `input`, ends that list with `inputs_end`, and makes one thing after
# the other with `step`. A step whose result exists is not repeated, and a step that was interrupted
# goes on where it stopped, because each of its commands does.
set -euo pipefail

# Folders are made absolute before the recipe moves to the root of the checkout.
RAW=$(realpath -m "$RAW") OUT=$(realpath -m "$OUT")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
THIRD_PARTY=$PWD/third_party
read -ra GEODE <<<"${GEODE:-geode-jax}"
read -ra TRAIN <<<"${TRAIN:-}"

dry=false partial=false topology=''
for option; do
    case $option in
    --dry-run) dry=true ;;
    --without-missing) partial=true ;;
    --topology=*) topology=${option#*=} ;;
    *)
        sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0" >&2
        exit 2
        ;;
    esac
done

declare -A missing=()
needed=()
steps=0

# input NAME PATH LOSS: the recipe reads PATH, and LOSS says what is lost without it.
input() {
    [[ -e $2 ]] || missing[$1]="$2: $3"
}

# required NAME PATH LOSS: an input without which the recipe cannot go on.
required() {
    input "$@"
    if [[ -v missing[$1] ]]; then needed+=("$1"); fi
}

# inputs_end: lists what is missing; that ends a recipe that was not told to go on, or cannot.
inputs_end() {
    local name hint='--without-missing goes on without them'
    for name in $(printf '%s\n' "${!missing[@]}" | sort); do
        echo "missing: $name: ${missing[$name]}" >&2
    done
    if ((${#needed[@]})); then
        hint="the recipe cannot do without ${needed[*]}"
    elif ((${#missing[@]} == 0)) || $partial; then
        return
    fi
    if ! $dry; then
        echo "error: ${#missing[@]} inputs are missing; $hint" >&2
        exit 2
    fi
}

# have NAME...: true unless the recipe goes on without one of these inputs.
have() {
    local name
    for name; do
        if $partial && [[ -v missing[$name] ]]; then return 1; fi
    done
}

# entries PATH: the number of files or folders in a folder, 0 where there is none.
entries() {
    if [[ -d $1 ]]; then find -L "$1" -mindepth 1 -maxdepth 1 | wc -l; else echo 0; fi
}

# gigabytes COUNT MEGABYTES: the disk that COUNT scenes of MEGABYTES each take.
gigabytes() {
    awk -v n="$1" -v mb="$2" 'BEGIN { printf "%d scenes of %.1f MB, %.1f GB", n, mb, n * mb / 1e3 }'
}

# passes EXPORT N: the epochs in which every question of an export is asked about once, where an epoch
# visits every scene and asks N of its questions.
passes() {
    if [[ ! -e $1/manifest.json ]]; then
        echo 1
        return
    fi
    python3 -c 'import json, sys
manifest = json.load(open(sys.argv[1] + "/manifest.json"))
print(max(1, round(manifest["questions"]["count"] / len(manifest["scenes"]) / int(sys.argv[2]))))' "$@"
}

# step TITLE RESULT DISK COMMAND...: makes the file RESULT, the last one that COMMAND writes.
step() {
    local title=$1 result=$2 disk=$3 state='to do' code=0
    shift 3
    steps=$((steps + 1))
    if [[ -e $result ]]; then state='done'; fi
    printf '\n== %d. %s (%s)\n' "$steps" "$title" "$state"
    if $dry; then
        printf '   disk: %s\n   %s\n' "$disk" "${*@Q}"
        return
    fi
    if [[ $state == done ]]; then return; fi
    "$@" || code=$?
    if ((code)); then
        echo "error: step $steps, $title, ended with $code; the same command goes on from here" >&2
        exit "$code"
    fi
}

# train CONFIG RUN ARGUMENT...: a step that trains a run, with the GPU hours that its plan predicts.
train() {
    local config=$1 run=$2
    shift 2
    step "train $config" "$run/summary.json" 'checkpoints of parameters and optimizer, three at most' \
        "${GEODE[@]}" train "$config" --workdir "$run" "$@" "${TRAIN[@]}"
    if ! $dry; then return; fi
    if [[ -z $topology ]]; then
        echo "   GPU hours: --topology=h100:1x8 computes their lower bound, some minutes a program"
        return
    fi
    local facts
    if facts=$("${GEODE[@]}" plan --config "$config" --topology "$topology" --train-only --json); then
        python3 -c 'import json, sys
plan = json.loads(sys.argv[1])
print("   GPU hours: at least %.3g on %s, for %d steps of %d scenes"
      % (plan["chip_hours"], plan["topology"], plan["steps"], plan["scenes_per_batch"]))' "$facts"
    else
        echo "   GPU hours: not planned, see the line above"
    fi
}
