"""Train the autoencoder.

python train/vae.py [quickstart|paper] [--deco none|cov|sid|vad] [--data.root FOLDER_OR_MANIFEST] [--out FOLDER] …
torchrun --nproc_per_node 4 train/vae.py paper …

No preset means `quickstart`; --help after a preset lists every option. The same command with the same --out resumes.
"""

import sys

from decovae.process import leave
from decovae.training.main import train_vae

if __name__ == "__main__":
    leave(train_vae(sys.argv[1:]))
