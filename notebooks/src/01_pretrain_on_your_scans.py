# %% [markdown]
# # 1. From a folder of scans to an encoder
#
# Hospitals have many scans and few labels. medclr first trains an *encoder* on the scans alone: a network that turns a
# slice into a list of numbers (its *features*), so that slices that show the same thing get similar numbers. With such
# features, a few labelled patients go further. This notebook makes an encoder from a folder of scans and looks at every
# step on the way.
#
# It runs as it is, on invented ("phantom") patients, in about two minutes on two cores. For your own scans, change
# `SCANS` in the next cell and run all cells again. Nothing is sent anywhere.

# %% parameters
from pathlib import Path

SCANS = None  # your folder, such as Path("/archive/ct"); None: phantom patients
MODALITY = None  # "CT", "MR", "XR" or "US", for NIfTI volumes and images whose names do not say it
LABELS = None  # a CSV with the columns patient_id (or file) and label; not needed here, but in notebook 2
MASKS = None  # a folder of NIfTI masks, named like their scans; not needed here, but in notebook 3
PATIENTS = 24  # phantom patients, if there are any
EPOCHS = 10  # passes over the slices; 100 for a real encoder
BATCH = 64  # slices a step; at most as many as there are for training
SIZE_PX = 96  # side of the stored slices; views are two thirds of it

# %% [markdown]
# Everything that is written goes to one folder, `WORK`, beside this notebook. Delete it when you are done. If a cell is
# interrupted, run it again: it goes on where it stopped.

# %%
import medclr
from medclr.data.phantom import write_cohort

WORK = Path("medclr_work") / (SCANS.name if SCANS else "phantoms")
scans, labels, masks, key = SCANS, LABELS, MASKS, None
if SCANS is None:
    scans = WORK / "scans"
    labels, masks, key = scans / "labels.csv", scans / "mr_masks", WORK / "key"
    if not scans.exists():
        print(write_cohort(scans, patients=PATIENTS))
        key.write_text("0e" * 32)  # makes the pseudonyms; your own key is drawn on first use
        key.chmod(0o600)
        odd = scans / "odd"  # and three files such as every archive has
        odd.mkdir()
        (odd / "cut_short.dcm").write_bytes((scans / "ct/sub-001/IM0001.dcm").read_bytes()[:20_000])
        (odd / "report.pdf").write_bytes(b"%PDF-1.7 no scan")
        (odd / "picture.png").write_bytes((scans / "xr/sub-001_dx.png").read_bytes())

# %% [markdown]
# ## Index: what is there?
#
# `index` opens every file once, puts DICOM files together into series, and writes a *manifest*: a table with one row a
# scan. Patients and files appear under pseudonyms. `split` decides for each patient, once and for all, whether he
# trains or tests: whoever tests later must not be seen in training.

# %%
manifest = WORK / "scans.csv"
found = medclr.index(
    [scans],
    manifest,
    modality=MODALITY,
    labels=labels,
    masks=masks,
    split="train=0.7,test=0.3",
    allow_unmatched=True,
    key_file=key,
)
print(found)

# %% [markdown]
# **Look at** the number of scans and patients: is it what you expect? A scan that cannot be read with certainty is
# refused, and the reason is written down. A few such files are normal. A **warning sign** is a reason that comes
# hundreds of times: it is then worth reading what it asks for (here, `MODALITY`).

# %%
from medclr.data.manifest import read_rejected

for row in read_rejected(manifest)[:10]:
    print(f"{row.path}: {row.reason}")  # medclr whereis tells which file an id stands for

# %% [markdown]
# ## Prepare: decode once
#
# `prepare` reads each scan a single time and keeps its slices, square and small, in a *store* from which training reads
# fast. Nothing is normalised away: CT stays in Hounsfield units.

# %%
from medclr.data.store import Store

print(medclr.prepare(manifest, WORK / "store", size_px=SIZE_PX, key_file=key))
store = Store(WORK / "store")

# %% [markdown]
# **Look at** the slices. Do they show what you expect, the right way up, with air black and bone (in CT) white?
# **Warning signs:** names burned into the pixels, localizers and screenshots between the slices, or pictures that are
# all grey (units that were not understood).

# %%
from medclr import gallery

gallery.slices(store, gallery.sample(store, 18))

# %% [markdown]
# ## Two views: what the encoder is asked
#
# The training task needs no label. Every slice is changed at random, twice, and the encoder has to find out which two
# of all these *views* come from one slice. What is changed is what the encoder learns to overlook, so each change
# stands for something that differs between scans of the same thing:
#
# - **crop and rotation**: where the patient lay, how large the field of view was. They also force the encoder to
#   recognise a whole from a part.
# - **window (CT), gamma, contrast**: how a reader or a scanner sets the grey values. MR has no units at all.
# - **bias field (MR), noise, blur**: the coil, the dose, the kernel.
# - **cut-out**: no single spot may decide.
# - **mirroring** only where the body allows it: the heart is on the left.
#
# **Look at** the rows below: the slice as it is stored, and five views of it with what was done. Could *you* tell that
# they belong together? If not, nor can the encoder. **Warning sign:** what you want to find later (a small lesion) is
# gone in most views. Then raise the smallest crop (`views.crop_area`) or lower `views.strength`.

# %%
from medclr.config import ViewsConfig

views = ViewsConfig(size_px=SIZE_PX * 2 // 3, crop_area=(0.2, 1.0))
gallery.views(store, gallery.sample(store, 4, seed=1), views)

# %% [markdown]
# ## Pretrain
#
# Only patients of the training split are shown. The settings are those of a short run. For a real one, start from a
# file in `configs/pretrain/`, and give it a night.

# %%
settings = {
    "epochs": EPOCHS,
    "batch": BATCH,
    "views.size_px": views.size_px,
    "views.crop_area": list(views.crop_area),
    "data.split": "train",
    "data.slices_per_scan": 16,  # neighbouring slices look alike; 16 of each scan an epoch are enough
    "monitor.sample": 256,
}
run = WORK / "run"
print(medclr.pretrain(WORK / "store", run, settings=settings))

# %% [markdown]
# ## Is it learning?

# %%
gallery.read_picture(run / "figures" / "curves.png")

# %% [markdown]
# **Look at**
#
# - the **loss**: it starts at or above log(2 x BATCH - 1), here 4.84, where all slices look alike to the encoder, and
#   must fall.
# - the **effective rank**: how many directions the embeddings use. It should stay far above 1.
# - the **uniformity**: 0 means that all embeddings are equal, -4 that they are spread evenly. It must fall.
# - **kNN** (only with labels): how often the nearest slices of *other patients* have the same label. For two classes,
#   0.5 is guessing. Here it tells nothing: most slices of a patient with lesions show none. It even lies below 0.5,
#   because a patient who is left out leaves more of the *other* class among the few who remain.
# - the **speed**. (The machine that ran this was busy with other work; so are the times printed on this page.)
#
# **Warning signs:** a loss that stays at its start; an effective rank below 2, or a uniformity that never leaves 0 (the
# encoder *collapsed*: it says the same of every slice; medclr warns of it). Then lower `optim.lr`, or take a larger
# `batch`.
#
# Curves can look fine while the features are useless, so look at the slices, too. Each row below begins with a slice;
# beside it are the five slices of **other patients** whose features are nearest. They should show the same part of the
# body. (A red frame: another modality or label. Notebook 4 looks closer.)

# %%
import numpy as np

from medclr.embed import extract
from medclr.models.frozen import open_encoder

everything = np.arange(len(store))
features = extract(open_encoder(str(run)), store, everything)  # [slices, features]
patient = store.column("patient")
rows = gallery.sample(store, 4, seed=2)
gallery.neighbours(store, gallery.find_neighbours(features, patient, rows))

# %% [markdown]
# Anatomy can also be counted. Every slice of a volume has a height between 0 (its lower end) and 1 (its upper end). How
# far from it, on average, is the nearest slice of another patient? An encoder that learnt nothing is the yardstick: it
# is surprisingly good, because slices that look alike have similar features whatever the weights.

# %%
untrained = extract(open_encoder("random", like=run), store, everything)
height, is_volume = store.column("position"), np.array([scan.depth > 1 for scan in store.scans])[store.column("scan")]
for name, x in {"this encoder": features, "untrained": untrained}.items():
    nearest = gallery.find_neighbours(x, patient, k=1).nearest[:, 0]
    gap = abs(height[nearest] - height)[is_volume]
    print(f"{name:>12}: {gap.mean():.1%} of the scan's height" if len(gap) else "no volumes: no heights to compare")

# %% [markdown]
# ## The encoder in your own code
#
# Three lines. An encoder is an ordinary torch module, and `read_views` turns a file (or the folder of a DICOM series)
# into just what the encoder saw in training.

# %%
from medclr.data.manifest import read_manifest

files = next(iter(read_manifest(manifest, key).files.values())).image  # of one scan; any path of yours will do
path = files[0] if len(files) == 1 else files[0].parent

encoder = medclr.load_encoder(run)
slices = medclr.read_views(path, encoder, modality=MODALITY)  # [slices, 1, rows, columns], in [0,1]
features_of_scan = encoder(slices)  # [slices, features]
print(tuple(slices.shape), "->", tuple(features_of_scan.shape))

# %% [markdown]
# ## Next
#
# - `02_few_labels_vs_imagenet_classification`: what the encoder is worth with a few labelled patients.
# - `03_few_labels_segmentation`: the same with masks.
# - `04_look_inside_embeddings`: what the encoder holds for alike, and what it mixes up.
#
# The same steps from the command line:
#
# ```
# medclr index    SCANS --out data_manifests/mine.csv --split train=0.7,test=0.3
# medclr prepare  data_manifests/mine.csv --out stores/mine --size-px 128 --workers 8
# medclr pretrain --config configs/pretrain/ct.yaml --store stores/mine --out runs/mine --data.split train
# ```
