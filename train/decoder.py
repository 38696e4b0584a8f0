"""Fine-tune the decoder of a trained autoencoder; the encoder, and with it every latent, stays as it is.

python train/decoder.py [quickstart|paper] --vae RUN [--noise-scale S] [--out FOLDER] …
torchrun --nproc_per_node 4 train/decoder.py --vae RUN …

RUN is the folder of a finished run of train/vae.py; its preset and its data are used unless others are given. --help
after a preset lists every option. The same command with the same --out resumes.
"""

import sys

from decovae.process import leave
from decovae.training.main import train_decoder

if __name__ == "__main__":
    leave(train_decoder(sys.argv[1:]))
