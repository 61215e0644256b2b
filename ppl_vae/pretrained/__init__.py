"""Trained models that come with the package, with cards that say what they are.

``load("vae-digits")`` gives the fitted pair and its data; ``card`` what is known of it; ``keep``
adds a model from a finished reproduction (``python -m ppl_vae.pretrained keep RUN RECORD NAME``).
"""

from ppl_vae.pretrained.cards import card as card
from ppl_vae.pretrained.cards import summaries as summaries
from ppl_vae.pretrained.files import FOLDER as FOLDER
from ppl_vae.pretrained.files import names as names
from ppl_vae.pretrained.keeping import keep as keep
from ppl_vae.pretrained.loading import as_run as as_run
from ppl_vae.pretrained.loading import load as load
