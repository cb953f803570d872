# %% [markdown]
# # 4. Look inside: what does the encoder hold for alike?
#
# A score says *how good* features are, not *what* they hold. This notebook looks: which slices are neighbours, what the
# clusters are, what is mixed up with what, and whether the same slice stands twice in the data.
#
# It goes on with what notebook 1 left in `medclr_work` (then it takes half a minute), or makes it first (then two
# minutes more, on two cores). For your own scans, set `SCANS` as in notebook 1.

# %% parameters
from pathlib import Path

SCANS = None  # your folder, as in notebook 1; None: phantom patients
LABELS = None  # a CSV with the columns patient_id (or file) and label, if you have any
MODALITY = None  # "CT", "MR", "XR" or "US", for NIfTI volumes and images whose names do not say it
PATIENTS = 24  # phantom patients, if there are any
EPOCHS = 10  # passes over the slices
BATCH = 64  # slices a step
SIZE_PX = 96  # side of the stored slices

# %%
import medclr
from medclr.data.phantom import write_cohort

WORK = Path("medclr_work") / (SCANS.name if SCANS else "phantoms")
run = WORK / "run"
if not (run / "encoder").exists():  # notebook 1 was not run: its steps in short
    scans, labels, key = SCANS, LABELS, None
    if SCANS is None:
        scans, labels, key = WORK / "scans", WORK / "scans" / "labels.csv", WORK / "key"
        print(write_cohort(scans, patients=PATIENTS))
        key.write_text("0e" * 32)
        key.chmod(0o600)
    split = "train=0.7,test=0.3"
    found = medclr.index(
        [scans], WORK / "scans.csv", modality=MODALITY, labels=labels, split=split, allow_unmatched=True, key_file=key
    )
    print(found)
    print(medclr.prepare(WORK / "scans.csv", WORK / "store", size_px=SIZE_PX, key_file=key))
    settings = {"epochs": EPOCHS, "batch": BATCH, "views.size_px": SIZE_PX * 2 // 3, "data.split": "train"}
    settings |= {"data.slices_per_scan": 16, "monitor.sample": 256}
    print(medclr.pretrain(WORK / "store", run, settings=settings))

# %% [markdown]
# ## Features
#
# One row of numbers a slice, from the encoder of the run, and, as a yardstick, from the same network before it learnt
# anything. (`medclr embed` writes such a table for other programs.)

# %%
import numpy as np

from medclr import gallery
from medclr.data.store import Store
from medclr.embed import extract, layout
from medclr.models.frozen import open_encoder

store = Store(WORK / "store")
everything = np.arange(len(store))
features = {
    "this encoder": extract(open_encoder(str(run)), store, everything),  # [slices, features]
    "untrained": extract(open_encoder("random", like=run), store, everything),
}


def of_scan(name: str) -> np.ndarray:
    """A column of the store's scans, for each slice."""
    return np.array([getattr(scan, name) for scan in store.scans])[store.column("scan")]


patient, modality, label = of_scan("patient_id"), of_scan("modality"), of_scan("label")
print({name: x.shape for name, x in features.items()})

# %% [markdown]
# ## Nearest neighbours
#
# Each row begins with a slice; beside it stand the slices with the nearest features **of other patients**. (Slices of
# the same patient would be near for no merit of the encoder.)
#
# **Look at** what the row has in common: the same height in the body, the same organ, perhaps the same noise. Both
# kinds of likeness are there, and the question is which of them comes first. A red frame marks another modality, or
# another label. **Warning signs:** rows that share only brightness, the shape of the border or the scanner; the same
# slice as the neighbour of everything.

# %%
rows = gallery.sample(store, 6)
nearest = {name: gallery.find_neighbours(x, patient, k=5) for name, x in features.items()}
gallery.neighbours(store, gallery.find_neighbours(features["this encoder"], patient, rows))

# %% [markdown]
# The same slices, to an encoder that has learnt nothing. It is no straw man: slices with the same outline and the same
# brightness are near to any network.

# %%
gallery.neighbours(store, gallery.find_neighbours(features["untrained"], patient, rows))

# %% [markdown]
# ## Maps
#
# t-SNE lays the slices out so that neighbours stay neighbours. Distances *between* clusters mean nothing, and clusters
# can be made by the method alone: read a map as a hint, and go back to the slices.
#
# **Look at** the four colourings of the same points. Modality and body part should fall apart into regions. The label
# should at best show as a gradient inside them: a lesion changes a small part of few slices. **Warning sign:** each
# patient is an island of his own in the last panel. The encoder has then learnt to recognise persons (or their
# scanners), and a score on slices of known patients would look better than it is. Try `simclr.negatives
# other_patients`.

# %%
points, how = layout(features["this encoder"], seed=0)
colours = {"modality": modality, "body part": of_scan("body_part"), "label": label}
gallery.maps(points, {**colours, "patient": [name[:8] for name in patient]})

# %% [markdown]
# ## What it mixes up
#
# For every slice: the nearest slice of another patient, and whether it is of the same kind. Each line of a table adds
# up to 100 %; what stands off the diagonal is mixed up.
#
# **Look at** the labels: lines that are all alike mean that the neighbours do not depend on the label. Here that is so,
# and no wonder: most slices of a patient with lesions show none. Few labels then need a model that finds the slices
# that matter (notebook 2), not neighbours.

# %%
first = nearest["this encoder"].nearest[:, 0]
gallery.mixed_up({name: (values, values[first]) for name, values in colours.items()})

# %% [markdown]
# Mixed-up slices are worth looking at, one by one: they show what the encoder goes by. Here are those whose neighbour
# is of another modality, or else of quite another height in the body.

# %%
height, is_volume = store.column("position"), of_scan("depth") > 1
oddness = 2 * (modality[first] != modality) + abs(height[first] - height) * is_volume  # [slices]
odd = np.argsort(-oddness, kind="stable")[:4]
gallery.neighbours(store, gallery.find_neighbours(features["this encoder"], patient, odd))

# %% [markdown]
# ## Own encoder against an untrained one
#
# Where in the body is the nearest slice of another patient? On the dashed line it lies at the same height. The closer
# the points, the better the features know anatomy, and nobody has told them of it. (Only for volumes.)

# %%
panels = {name: (height[is_volume], height[found.nearest[is_volume, 0]]) for name, found in nearest.items()}
gallery.scatter(panels, "height of the slice", "height of its neighbour", diagonal=True) if is_volume.any() else None

# %% [markdown]
# The same in numbers, over five neighbours each. With few patients, differences of a few per cent are chance; another
# draw of patients would turn them round.

# %%
for name, found in nearest.items():
    of_k = found.nearest  # [slices, 5]
    shares = {"modality": (modality[of_k] == modality[:, None]).mean(), "label": (label[of_k] == label[:, None]).mean()}
    words = ", ".join(f"same {what} {share:.1%}" for what, share in shares.items())
    gap = abs(height[of_k] - height[:, None])[is_volume]
    print(f"{name:>12}: {words}" + (f", height off by {gap.mean():.1%}" if len(gap) else ""))

# %% [markdown]
# ## Does the same slice stand there twice?
#
# Copies do harm: a patient in training and test under two numbers makes every score look better. `dedup` compares all
# slices by what they look like, and writes a page with the pairs side by side.

# %%
summary = medclr.dedup(WORK / "store")
print(summary)

# %% [markdown]
# **Look at** the pairs before you believe it. Phantom patients are drawn by the same program, so that slices at the
# ends of a scan look nearly the same: these are no copies. On real scans, a pair of *different* patients is mostly the
# same image under two numbers, and then you leave one out: `medclr pretrain ... --data.leave_out TABLE`.

# %%
import csv

with summary.table.open(newline="") as file:
    pairs = sorted(csv.DictReader(file), key=lambda row: int(row["distance"]))[:6]
both = [int(pair[column]) for pair in pairs for column in ("slice", "kept_slice")]
gallery.slices(store, both) if both else "no copies"

# %% [markdown]
# ## Next
#
# `medclr embed --encoder RUN --store STORE --out features.parquet` writes the features of your scans for other
# programs, and `medclr probe` says what they are worth with a few labels, with intervals.
