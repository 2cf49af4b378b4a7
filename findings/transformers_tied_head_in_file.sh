#!/usr/bin/env bash
# A checkpoint that says `tie_word_embeddings: true` and holds a head of its own: transformers uses both.
#
# Guess: the config decides: with tied embeddings the head is the embedding, and an lm_head.weight in the file is a
#   left-over that nobody reads.
# Instead: transformers compares the two tensors. Where they differ it warns and keeps both, although its config goes on
#   saying that they are tied; where they are equal they share memory.
# Versions: transformers 5.24.0, torch 2.13.0, safetensors 0.8.0, Python 3.11; 2026-11-27. torch is a large package.
# Seen:
#   another head: config says tied True, one memory False, head as in the file True, embedding True
#   the same head: config says tied True, one memory True
# For pdjax: a fine-tune whose head was untied without a word in its config gave other tokens here. The head of the file
#   is used wherever it is not the embedding (pdjax/model/checkpoint).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  transformers==5.24.0 torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" -I - "$folder/model" <<'END'
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

folder = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
sizes = {'hidden_size': 8, 'intermediate_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2}
config = LlamaConfig(vocab_size=16, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, **sizes)
LlamaForCausalLM(config).save_pretrained(folder)
weights = load_file(folder / 'model.safetensors')
embedding = weights['model.embed_tokens.weight']
assert 'lm_head.weight' not in weights


def loaded(head):
  save_file(weights | {'lm_head.weight': head}, folder / 'model.safetensors', metadata={'format': 'pt'})
  model = LlamaForCausalLM.from_pretrained(folder)
  shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
  kept = torch.equal(model.lm_head.weight, head), torch.equal(model.model.embed_tokens.weight, embedding)
  return model.config.tie_word_embeddings, shared, *kept


other, same = loaded(torch.randn(16, 8)), loaded(embedding.clone())
tied, shared, head, embedded = other
print(f"another head: config says tied {tied}, one memory {shared}, head as in the file {head}, embedding {embedded}")
print(f'the same head: config says tied {same[0]}, one memory {same[1]}')
assert other == (True, False, True, True) and same == (True, True, True, True)
END
