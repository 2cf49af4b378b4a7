"""Two matrices in a file whose config.json ties them: the cases of heads.npz, for its script and for the test."""

import numpy as np

HEADS = {
  'other': lambda embed: {'model.embed_tokens.weight': embed, 'lm_head.weight': np.roll(embed, 1, axis=0)},
  'equal': lambda embed: {'model.embed_tokens.weight': embed, 'lm_head.weight': embed.copy()},
  'head alone': lambda embed: {'lm_head.weight': embed},
  'other by one bit': lambda embed: {'model.embed_tokens.weight': embed, 'lm_head.weight': np.nextafter(embed, 1)},
  'wider type': lambda embed: {'model.embed_tokens.weight': embed, 'lm_head.weight': embed.astype(np.float32)},
}
