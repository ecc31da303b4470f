#!/usr/bin/env bash
# Trains runs of README's table of quality, a queue of MODEL:ARM:SEED a GPU, into OUT/MODEL, and makes a table and a report of each
# model's. Started again it goes on where it was.
#
#     cargo build --release --example train
#     bash benches/text.sh TEXT
#     bash benches/quality.sh TEXT OUT '30m:bf16:0 10m:bf16:0' '30m:mxfp4:0 10m:mxfp4:0'
#
#   TRAIN=...   the program, by default target/release/examples/train
#   ARGS=...    more of its options, e.g. '--steps 100'
set -euo pipefail
text=${1:?TEXT OUT JOBS...}
out=${2:?TEXT OUT JOBS...}
shift 2
train=${TRAIN:-target/release/examples/train}

queue() {
    local gpu=$1 job model arm seed
    for job in $2; do
        IFS=: read -r model arm seed <<<"$job"
        local run=$out/$model/$arm-$seed resume=()
        [ ! -e "$run.done" ] || continue
        [ ! -d "$run" ] || resume=(--resume)
        mkdir -p "$out/$model"
        # shellcheck disable=SC2086
        if "$train" --data "$text" --data-limit 900 --model "$model" --arms "$arm" --first-seed "$seed" --device "#$gpu" \
            --out "$run" "${resume[@]}" ${ARGS:-} >"$run.log" 2>&1; then
            touch "$run.done"
            echo "$job done after $SECONDS s: $(tail -n 3 "$run.log" | head -n 1)"
        else
            echo "$job failed: $run.log" >&2
            return 1
        fi
    done
}

queues=()
for jobs in "$@"; do
    queue "${#queues[@]}" "$jobs" &
    queues+=($!)
done
failed=0
for pid in "${queues[@]}"; do
    wait "$pid" || failed=1
done
for model in "$out"/*/; do
    if compgen -G "$model*/metrics.jsonl" >/dev/null; then
        "$train" --report "$model"*/metrics.jsonl --out "$model"
    fi
done
exit "$failed"
