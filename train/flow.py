"""Train the flow from noise to latents.

python train/flow.py [quickstart|paper] --vae RUN [--train-on draws|mean] [--conditions age sex] [--out FOLDER] …
torchrun --nproc_per_node 4 train/flow.py --vae RUN …

RUN is the folder of a finished run of train/vae.py or train/decoder.py; its volumes are encoded first where they are
not. --latents FOLDER takes what `decovae encode` wrote. --help after a preset lists every option. The same command with
the same --out resumes.
"""

import sys

from decovae.process import leave
from decovae.training.main import train_flow

if __name__ == "__main__":
    leave(train_flow(sys.argv[1:]))
