"""Published figures, reproduced: what was published, and what our recipes come to beside it."""

from ppl_vae.reproduction.published import Group as Group
from ppl_vae.reproduction.published import Measure as Measure
from ppl_vae.reproduction.published import Published as Published
from ppl_vae.reproduction.published import published as published
from ppl_vae.reproduction.record import reproduce as reproduce
from ppl_vae.reproduction.scoring import score as score
from ppl_vae.reproduction.table import markdown as markdown
from ppl_vae.reproduction.table import read_records as read_records
