#!/usr/bin/env bash
# What hard negatives, a reranker and a teacher are worth, on a CPU: SciFact's test split and MedQuAD's by focus.
#
#   first        fine-tuned on pairs
#   again        `first`, fine-tuned on pairs for some more steps: what the steps alone are worth
#   mined        the same steps on hard negatives that `first` mined
#   taught       the same, on negatives among the first hits, learning a reranker's scores of them, too (KL)
#   first+rerank the first hits of `first` scored anew by a reranker that was trained on the mined negatives
#   fused        that run and the one of `first`, by relative scores, with the weights that are best on dev
#
# Run from the project's root: recipes/negatives_cpu.sh [OUTPUT]. Started again it goes on where it was stopped.
# LLARA_DATA names the data folder, PYTHON the interpreter that llara is installed for. Models run in int8 (--dtype).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/negatives}
data=${LLARA_DATA:-../shared/data}
python=${PYTHON:-.venv/bin/python}
llara=$(dirname "$python")/llara
scifact=$data/scifact medquad=$data/medquad/pairs.jsonl.gz
depth=20       # hits that are scored anew
taught_depth=12 # and of training queries, for the teacher

stage() { # name, command...
    local name=$1
    shift
    "$python" recipes/measured.py "$out/stages.jsonl" "$name" -- "$@"
}

measure() { # arm: encodes, indexes and searches both collections with its model
    local arm=$1 set
    for set in scifact medquad; do
        stage "$arm: encode $set" "$llara" encode --model "$out/$arm/model" --corpus "${!set}" --dtype int8 \
            --output "$out/$arm/$set/vectors" --shard-size 1000
        stage "$arm: index $set" "$llara" index --vectors "$out/$arm/$set/vectors" --output "$out/$arm/$set/index"
        stage "$arm: search $set" "$llara" search --index "$out/$arm/$set/index" --queries "${!set}" --split test \
            --dtype int8 --top-k 100 --output "$out/runs/$set/$arm.trec"
    done
}

train() { # arm, arguments of finetune...
    local arm=$1
    shift
    stage "$arm: finetune" "$llara" finetune --config recipes/negatives_finetune.toml "$@" --output "$out/$arm/model"
    measure "$arm"
}

several() { # a number, a path: the path, that many times
    local each
    for ((each = 0; each < $1; each++)); do echo "$2"; done
}

# SciFact has 655 training queries, MedQuAD 11,047: SciFact's count eight times.
mapfile -t pairs < <(several 8 "$scifact")
train first --model mini --train "${pairs[@]}" "$medquad"

# Negatives of all of SciFact's training queries and of 4,000 of MedQuAD's, from the ranks that LLARA and RankLLaMA take
# them from. SciFact's count three times: a third of the mixture, as it was for `first`.
for set in scifact medquad; do
    stage "queries of $set" "$python" recipes/sample_queries.py "${!set}" "$out/$set-queries.jsonl" 4000
    stage "search for negatives, $set" "$llara" search --index "$out/first/$set/index" --dtype int8 \
        --queries "$out/$set-queries.jsonl" --top-k 200 --output "$out/train-$set.trec"
    stage "mine, $set" "$llara" mine --run "$out/train-$set.trec" --queries "$out/$set-queries.jsonl" \
        --qrels "${!set}" --split train --corpus "$out/first/$set/vectors" --output "$out/mined-$set.jsonl" \
        --negatives 7 --from-rank 3 --to-rank 200 --relative-margin 0.02
done
mapfile -t mined < <(several 3 "$out/mined-scifact.jsonl")
mined+=("$out/mined-medquad.jsonl")

more=(--model "$out/first/model" --steps 40 --learning-rate 5e-4)
train again "${more[@]}" --train "${mined[@]}" --negatives 0
train mined "${more[@]}" --train "${mined[@]}" --negatives 3

stage "reranker: finetune" "$llara" finetune --config recipes/negatives_rerank_finetune.toml \
    --model "$out/first/model" --train "${mined[@]}" --output "$out/reranker"

rerank() { # collection, its split: the run of `first` over it, scored anew
    local set=$1 split=$2 tail=
    [[ $split == test ]] || tail=-$split
    stage "first+rerank: $set, $split" "$llara" rerank --model "$out/reranker" --dtype int8 \
        --run "$out/runs/$set/first${tail}.trec" --queries "${!set}" --split "$split" \
        --corpus "$out/first/$set/vectors" --depth "$depth" --top-k "$depth" \
        --output "$out/runs/$set/first+rerank${tail}.trec"
}

for set in scifact medquad; do
    stage "first: search $set, dev" "$llara" search --index "$out/first/$set/index" --queries "${!set}" --split dev \
        --dtype int8 --top-k 100 --output "$out/runs/$set/first-dev.trec"
    rerank "$set" dev
    rerank "$set" test
    stage "weights: $set" "$python" recipes/fusion_weights.py "$out/runs/$set/first-dev.trec" \
        "$out/runs/$set/first+rerank-dev.trec" "${!set}" "$out/weights-$set.txt"
    read -ra weights <"$out/weights-$set.txt"
    stage "fused: $set" "$llara" fuse --run "$out/runs/$set/first.trec" "$out/runs/$set/first+rerank.trec" \
        --method relative --weights "${weights[@]}" --output "$out/runs/$set/fused.trec"
    # The teacher reads what may become a negative, and the relevant documents.
    stage "teacher: $set" "$llara" rerank --model "$out/reranker" --dtype int8 --run "$out/train-$set.trec" \
        --queries "$out/$set-queries.jsonl" --corpus "$out/first/$set/vectors" --depth "$taught_depth" \
        --add-relevant "$out/$set-queries.qrels" --output "$out/taught-$set.trec"
    stage "mine with scores, $set" "$llara" mine --run "$out/train-$set.trec" --scores "$out/taught-$set.trec" \
        --queries "$out/$set-queries.jsonl" --qrels "${!set}" --split train --corpus "$out/first/$set/vectors" \
        --output "$out/taught-$set.jsonl" --negatives 7 --from-rank 1 --to-rank "$taught_depth"
done
mapfile -t taught < <(several 3 "$out/taught-scifact.jsonl")
taught+=("$out/taught-medquad.jsonl")
train taught "${more[@]}" --train "${taught[@]}" --negatives 3 --distill kl --distill-weight 0.5

for set in scifact medquad; do
    runs=$out/runs/$set
    "$llara" evaluate --run "$runs/first.trec" "$runs/again.trec" "$runs/mined.trec" "$runs/taught.trec" \
        --qrels "${!set}" --split test --output "$out/$set.json"
    "$llara" evaluate --run "$runs/again.trec" "$runs/mined.trec" "$runs/taught.trec" \
        --qrels "${!set}" --split test --output "$out/$set-again.json"
    # A run of the first hits alone has no recall to compare.
    "$llara" evaluate --run "$runs/first.trec" "$runs/first+rerank.trec" "$runs/fused.trec" --metrics nDCG@10 RR@10 \
        --qrels "${!set}" --split test --output "$out/$set-rerank.json"
done
"$python" recipes/negatives_report.py "$out"
