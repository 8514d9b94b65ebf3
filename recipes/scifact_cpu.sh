#!/usr/bin/env bash
# The whole job on real data, on a CPU: three arms that are fine-tuned alike, beside BM25, on SciFact's test split and on
# MedQuAD's test split by focus.
#
#   finetuned           the base model as it is
#   lm+finetuned        after plain language-model training
#   adapted+finetuned   after EBAE + EBAR on the same text, with the same steps and learning rate
#
# Run from the project's root: recipes/scifact_cpu.sh [OUTPUT]. Started again it goes on where it was stopped.
# LLARA_DATA names the data folder, PYTHON the interpreter that llara is installed for.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/scifact}
data=${LLARA_DATA:-../shared/data}
python=${PYTHON:-.venv/bin/python}
llara=$(dirname "$python")/llara
scifact=$data/scifact medquad=$data/medquad/pairs.jsonl.gz wiki=$data/wiki/articles.jsonl.gz

train=("$scifact" "$scifact" "$scifact" "$scifact" "$scifact" "$scifact" "$scifact" "$scifact" "$medquad")

stage() { # name, command...
    local name=$1
    shift
    "$python" recipes/measured.py "$out/stages.jsonl" "$name" -- "$@"
}

measure() { # arm: encodes, indexes and searches both collections with its model
    local arm=$1 set corpus
    for set in scifact medquad; do
        corpus=${!set}
        stage "$arm: encode $set" "$llara" encode --model "$out/$arm/model" --corpus "$corpus" \
            --output "$out/$arm/$set/vectors" --shard-size 1000
        stage "$arm: index $set" "$llara" index --vectors "$out/$arm/$set/vectors" --output "$out/$arm/$set/index"
        stage "$arm: search $set" "$llara" search --index "$out/$arm/$set/index" --queries "$corpus" --split test \
            --output "$out/runs/$set/$arm.trec"
    done
}

for set in scifact medquad; do
    stage "bm25: index $set" "$llara" index --type bm25 --corpus "${!set}" --output "$out/bm25/$set"
    stage "bm25: search $set" "$llara" search --index "$out/bm25/$set" --queries "${!set}" --split test \
        --output "$out/runs/$set/bm25.trec"
done

for arm in finetuned lm+finetuned adapted+finetuned; do
    base=mini
    if [ "$arm" != finetuned ]; then
        objective=ebae+ebar
        [ "$arm" = lm+finetuned ] && objective=lm
        base=$out/$arm/base
        stage "$arm: adapt" "$llara" adapt --config recipes/scifact_adapt.toml --corpus "$wiki" "$scifact/corpus.jsonl.gz" \
            --objective "$objective" --output "$base"
    fi
    stage "$arm: finetune" "$llara" finetune --config recipes/scifact_finetune.toml --train "${train[@]}" \
        --model "$base" --output "$out/$arm/model"
    measure "$arm"
done

for set in scifact medquad; do
    runs=$out/runs/$set
    "$llara" evaluate --run "$runs/finetuned.trec" "$runs/lm+finetuned.trec" "$runs/adapted+finetuned.trec" \
        "$runs/bm25.trec" --qrels "${!set}" --split test --output "$out/$set.json"
done
"$python" recipes/scifact_report.py "$out"
