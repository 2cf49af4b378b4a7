r"""Writes tests/data/texts.json: what transformers and SentencePiece say that token ids are as text.

python tests/data/make_texts.py        # needs transformers and sentencepiece, which the tests do not

The tokenizers are tiny, and each has the decoder that its class in transformers gives it.
"""

import io
import json
import pathlib

import sentencepiece
import transformers

FILE = pathlib.Path(__file__).parent / 'texts.json'

BYTES = [f'<0x{byte:02X}>' for byte in (0x0A, 0x41, *'é漢😀'.encode(), 0xFF)]
PIECES = ['▁', 'a', '▁a', '▁cat', 'cat', 's', '.', '▁.', '▁▁', '漢']
LETTERS = ['a', 'Ġcat', 'cat', 'Ġ', '.', 'Ã', '©', 'ðŁ', 'ĺ', 'Ģ', 'ÿ', '漢']


def numbered(tokens: list[str]) -> dict[str, int]:
  return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def scored(tokens: list[str]) -> list[tuple[str, float]]:
  return [(token, -1.0) for token in tokens]


TOKENIZERS = {
  'llama': (transformers.LlamaTokenizer, {'vocab': numbered(['<unk>', '<s>', '</s>', *BYTES, *PIECES]), 'merges': []}),
  'gemma': (
    transformers.GemmaTokenizer,
    {'vocab': numbered(['<pad>', '<eos>', '<bos>', '<unk>', '<mask>', *BYTES, *PIECES]), 'merges': []},
  ),
  't5': (transformers.T5Tokenizer, {'vocab': scored(['<pad>', '</s>', '<unk>', *PIECES]), 'extra_ids': 0}),
  'gpt2': (transformers.GPT2Tokenizer, {'vocab': numbered(['<|endoftext|>', *LETTERS]), 'merges': []}),
  'bert': (
    transformers.BertTokenizer,
    {'vocab': numbered(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'cat', '##s', '.', '##.', "'", 'n', '漢'])},
  ),
  'gpt1': (
    transformers.OpenAIGPTTokenizer,
    {'vocab': numbered(['<unk>', 'a</w>', 'cat</w>', 'cat', 's</w>', '.</w>', '漢']), 'merges': []},
  ),
}
E_ACUTE, KANJI, SMILE = (tuple(f'<0x{byte:02X}>' for byte in char.encode()) for char in 'é漢😀')

# prompt and answer, as tokens
PIECES_BEHIND = [
  (('a',), ('▁cat', '▁cat')),
  (('<s>',), ('▁cat', '▁cat')),
  ((), ('▁cat', 's')),
  (('<s>', '▁a'), ('</s>', '▁cat', '.')),
  (('▁',), ('cat',)),
  (('▁▁',), ('▁cat',)),
  (('▁a', '</s>'), ('▁', 'cat')),
  (('a',) * 40, ('▁cat',)),
]
CASES = {
  'llama': [
    *PIECES_BEHIND,
    (('a', *KANJI), (*SMILE, 'a')),
    (('a', *KANJI[:2]), (*KANJI[2:], 'a')),
    (('a', *SMILE[:1]), (*SMILE[1:], '▁cat')),
    ((*SMILE[:3],), (*SMILE[3:], *E_ACUTE)),
    (('a',), ('<0x0A>', '<0x41>', '漢', '</s>', *E_ACUTE)),
    (('▁a',), (*E_ACUTE[:1], '</s>', *E_ACUTE[1:])),
  ],
  'gemma': [
    *((tuple({'<s>': '<bos>', '</s>': '<eos>'}.get(t, t) for t in p),
       tuple({'<s>': '<bos>', '</s>': '<eos>'}.get(t, t) for t in a)) for p, a in PIECES_BEHIND),
    (('<bos>', 'a', *KANJI[:1]), (*KANJI[1:], '▁cat')),
  ],
  't5': [(tuple(t for t in p if t != '<s>'), a) for p, a in PIECES_BEHIND],
  'gpt2': [
    (('a',), ('Ġcat', 'Ġcat')),
    (('<|endoftext|>',), ('Ġcat',)),
    (('a', 'Ã'), ('©', 'Ġcat')),
    (('a', 'ðŁ', 'ĺ'), ('Ģ', '.')),
    (('Ġcat', 'Ã'), ('漢', '.')),
    ((), ('Ã', '<|endoftext|>', '©')),
    (('a', 'ÿ'), ('ÿ', 'Ã', 'a')),
  ],
  'bert': [
    (('a',), ('cat', '##s', '.')),
    (('[CLS]',), ('cat', '##s')),
    (('[CLS]', 'a', '[SEP]'), ('##s', 'cat')),
    ((), ('##s', '##s', '.', '##.')),
    (('cat', "'"), ('n', '漢')),
  ],
  'gpt1': [
    (('a</w>',), ('cat</w>', 'cat</w>')),
    (('cat',), ('s</w>', '.</w>')),
    (('<unk>',), ('cat', 's</w>')),
    ((), ('a</w>', '漢', 'a</w>')),
    (('a</w>', 'a</w>'), ('漢',)),
  ],
}  # fmt: skip

RUNS = [
  'e2', 'e282', 'e28241', 'f09f98', 'f09f9841', 'eda080', 'c080', 'f5808080', 'f4908080', 'e08080', 'ff', '8080',
  'e282e282ac', 'c3c3a9', 'f0808080', 'f09fe282ac', '00', 'efbfbd', 'efbfbe', 'efbbbf', 'c3a9ff', 'ffc3a9',
  'e6bca2f09f9880c3a9', 'e6bca2f09f98', '41c3', 'f09f98f09f9880', 'c1bf', 'fefe', 'e6bcc3a9',
]  # fmt: skip


def decoded(name: str) -> dict:
  kind, vocabulary = TOKENIZERS[name]
  tokenizer = kind(**vocabulary)
  rows = []
  for prompt, answer in CASES[name]:
    prompt_ids, ids = (tokenizer.convert_tokens_to_ids(list(tokens)) for tokens in (prompt, prompt + answer))
    texts = [tokenizer.decode(some, skip_special_tokens=True) for some in (prompt_ids, ids)]
    rows.append([prompt_ids, ids[len(prompt_ids) :], *texts])
  return {'tokenizer': json.loads(tokenizer.backend_tokenizer.to_str()), 'decoded': rows}


def byte_runs() -> dict[str, str]:
  """Runs of bytes, in hexadecimal, as SentencePiece decodes them between two words."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the cat sat on a mat'] * 20), model_writer=model, vocab_size=280, model_type='bpe',
    byte_fallback=True, character_coverage=1.0, minloglevel=2,
  )  # fmt: skip
  pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  word = pieces.encode('cat')
  texts = {}
  for run in RUNS:
    text = pieces.decode([*word, *(pieces.piece_to_id(f'<0x{byte:02X}>') for byte in bytes.fromhex(run)), *word])
    assert text.startswith('cat') and text.endswith(' cat'), text
    texts[run] = text.removeprefix('cat').removesuffix(' cat')
  return texts


def main() -> None:
  texts = {
    'transformers': transformers.__version__,
    'sentencepiece': sentencepiece.__version__,
    'byte_runs': byte_runs(),
    'tokenizers': {name: decoded(name) for name in TOKENIZERS},
  }
  FILE.write_text(json.dumps(texts, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
