#!/usr/bin/env bash
# tokenizers' ByteFallback makes a whole run of bytes U+FFFD for one bad byte; SentencePiece spoils that byte alone.
#
# Guess: a decoder that stands for SentencePiece's gives its text, so that what a bad byte costs is one character.
# Instead: one bad byte turns every byte of the run, before and behind it, into a U+FFFD of its own. What a stream has
#   shown of a run can so be unsaid by a later byte; DecodeStream holds such a run back until it ends, and in one order
#   of bytes raises an exception.
# Versions: tokenizers 0.23.3, sentencepiece 0.2.3, Python 3.11; 2026-11-27.
# Seen:
#   e9 6f22 as UTF-8: tokenizers '\xe9\u6f22', sentencepiece '\xe9\u6f22'
#   with ff before it: tokenizers '\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd', sentencepiece '\ufffd\xe9\u6f22'
#   with ff behind it: tokenizers '\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd', sentencepiece '\xe9\u6f22\ufffd'
#   DecodeStream, ff before it: text at tokens [6] of 7; without ff: [1, 4, 5] of 6
# For pdjax: an answer's text streamed late or not at all while a model wrote in bytes. pdjax/model/decoding_stages.py
#   gives each character when its bytes are complete.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 sentencepiece==0.2.3
"$folder/venv/bin/python" -I - <<'END'
import io

import sentencepiece
from tokenizers import Tokenizer, decoders, models

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
  sentence_iterator=iter(['a cat sat on a mat'] * 20), model_writer=model, model_type='bpe', vocab_size=280,
  byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
)
theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
vocab = {theirs.id_to_piece(token): token for token in range(theirs.get_piece_size())}
ours = Tokenizer(models.BPE(vocab, [], unk_token='<unk>', byte_fallback=True))
ours.decoder = decoders.Sequence(
  [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
)
text = '\u00e9\u6f22'.encode()


def ids(run):
  return [vocab[f'<0x{byte:02X}>'] for byte in run]


def arrivals(run):
  stream = decoders.DecodeStream(skip_special_tokens=False)
  tokens = [*ids(run), vocab['\u2581a']]
  return [place for place, token in enumerate(tokens) if stream.step(ours, token)], len(tokens)


found = {}
for name, run in (
  ('e9 6f22 as UTF-8', text), ('with ff before it', b'\xff' + text), ('with ff behind it', text + b'\xff')
):
  found[name] = ours.decode(ids(run)), theirs.decode(ids(run))
  print(f'{name}: tokenizers {ascii(found[name][0])}, sentencepiece {ascii(found[name][1])}')
(late, of), (early, all_of) = arrivals(b'\xff' + text), arrivals(text)
print(f'DecodeStream, ff before it: text at tokens {late} of {of}; without ff: {early} of {all_of}')
bad, good = '\ufffd', text.decode()
assert found['e9 6f22 as UTF-8'] == (good, good)
assert found['with ff before it'] == (6 * bad, bad + good)
assert found['with ff behind it'] == (6 * bad, good + bad)
assert (late, early) == ([6], [1, 4, 5])
END
