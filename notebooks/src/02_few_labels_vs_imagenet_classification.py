# %% [markdown]
# # 2. A few labels: own pretraining, ImageNet, or nothing?
#
# You have many scans, and labels for a few patients. Is an encoder that was pretrained on your own scans worth more
# than one that anybody can have (ImageNet: photographs), or than none? This notebook asks the question as it has to be
# asked: the same patients for all, several draws of who is labelled, intervals, and test patients that nobody has seen.
#
# It runs as it is on invented patients, some with metastases in the lungs, in about three minutes on two cores. For
# your own scans, set `SCANS` and `LABELS`.
#
# Do not expect a winner here: the cohort is tiny on purpose. What you can learn is how to see *that there is none*.

# %% parameters
from pathlib import Path

SCANS = None  # your folder, as in notebook 1; None: X-rays of phantom patients
LABELS = None  # a CSV with the columns patient_id (or file) and label
MODALITY = None  # "CT", "MR", "XR" or "US", for NIfTI volumes and images whose names do not say it
PATIENTS = 48  # phantom patients, if there are any
EPOCHS = 60  # passes over the slices, in pretraining
BATCH = 24  # slices a step of it; at most as many as there are for training
BUDGETS = [4, 12, "100%"]  # labelled patients to learn from
SEEDS = 3  # draws of who is labelled; five or more for a result
STEPS = 20  # of training on the labelled patients; 300 for a result
SIZE_PX = 72  # side of the stored slices

# %% [markdown]
# ## Scans, labels, and an encoder
#
# As in notebook 1: index, prepare, pretrain. What is new are the labels. `split` sets test patients aside, by a hash of
# the patient; pretraining sees the others alone (and none of their labels).

# %%
import medclr
from medclr.data.phantom import write_cohort

WORK = Path("medclr_work") / (SCANS.name if SCANS else "phantom_xrays")
scans, labels, key = SCANS, LABELS, None
if SCANS is None:
    cohort, key = WORK / "scans", WORK / "key"
    scans, labels = cohort / "xr", cohort / "labels.csv"
    if not cohort.exists():
        print(write_cohort(cohort, patients=PATIENTS))
        key.write_text("0e" * 32)  # makes the pseudonyms; your own key is drawn on first use
        key.chmod(0o600)
run = WORK / "run"
if not (run / "encoder").exists():  # or notebook 1 has made it
    split = "train=0.7,test=0.3"
    found = medclr.index(
        [scans], WORK / "scans.csv", modality=MODALITY, labels=labels, split=split, allow_unmatched=True, key_file=key
    )
    print(found)
    print(medclr.prepare(WORK / "scans.csv", WORK / "store", size_px=SIZE_PX, key_file=key))
    settings = {"epochs": EPOCHS, "batch": BATCH, "views.size_px": SIZE_PX * 2 // 3, "data.split": "train"}
    settings |= {"data.slices_per_scan": 16, "monitor.sample": 256, "monitor.every_epochs": 10}
    print(medclr.pretrain(WORK / "store", run, settings=settings))

# %% [markdown]
# **Look at** some scans of both classes. Could you tell them apart? (Round spots in the lungs are metastases.) If a
# radiologist cannot see it at this size, neither will a network: then raise `SIZE_PX`.

# %%
import numpy as np

from medclr import gallery
from medclr.data.store import Store

store = Store(WORK / "store")
of_class = [np.flatnonzero(store.column("label") == number) for number in range(len(store.info.labels))]
gallery.slices(store, np.concatenate([rows[:: max(1, len(rows) // 6)][:6] for rows in of_class]))

# %% [markdown]
# ## The comparison
#
# `medclr compare` trains, for every start ("init"), every number of labelled patients and every seed, one model, and
# tests it on the same test patients. Two ways to use an encoder:
#
# - **probe**: the encoder stays as it is, and a logistic regression learns on its features. Quick, and it says what is
#   *in* the features.
# - **finetune**: all weights go on learning from the labelled patients. Mostly better, if there are enough of them.
#
# The settings stand in a file, so that a comparison can be repeated to the digit. The ImageNet weights that install
# without a download are those of EfficientNet-Lite0, the run is a ResNet-18: a difference between them is also one of
# networks. (`docs/results.md` has comparisons with one network for all.)

# %%
plan = WORK / "compare.yaml"
plan.write_text(f"""\
store: {WORK / "store"}
title: {WORK.name}
task: classify
protocols: [probe, finetune]
budgets: {BUDGETS}
seeds: {SEEDS}
inits:
  random: {{encoder: random}}
  ImageNet: {{encoder: imagenet}}
  own pretraining: {{encoder: {run}}}
settings: {{steps: {STEPS}, batch: 8, size_px: {SIZE_PX * 2 // 3}}}
resamples: 1000
""")
comparison = medclr.compare(plan, WORK / "comparison", jobs=2)  # two models at a time
print(comparison)

# %% [markdown]
# **Look at** the brackets before you look at the numbers. Each is a 95 % interval: with other test patients, the score
# could as well have been anywhere in it. 0.5 is guessing. The last lines say in words whether the data support any
# difference to ImageNet.
#
# ## The curve

# %%
gallery.read_picture(WORK / "comparison/figures/curve.png")

# %% [markdown]
# **Look at** the bands, not the lines. A score should rise with the number of labelled patients; where it does not,
# chance is larger than what was learnt. **Warning signs:** a band that reaches from 0.2 to 0.9 (too few test patients:
# nothing can be concluded, whatever the line does); an AUC far *below* 0.5 (with few patients mere chance; with many, a
# sign that labels or splits are mixed up).
#
# ## The difference, patient by patient
#
# All models were tested on the same patients, so they can be compared in pairs. That is much sharper than to compare
# two bands: some patients are hard for everybody.

# %%
gallery.read_picture(WORK / "comparison/figures/difference.png")

# %% [markdown]
# **Look at** zero. A thick bar that touches it means that the data do not support a difference, in either direction.
# That is *not* the same as "both are equally good". And one bar in twenty misses zero by chance alone, so a single one
# that just misses it is no result. What would be one: five seeds and more, dozens of test patients, and the same
# direction at neighbouring budgets.

# %%
gallery.read_picture(WORK / "comparison/figures/patients-finetune.png")

# %% [markdown]
# Each dot is a test patient, and the probability that the models gave to his true class. (All near 0.5: twenty steps
# move little.) **Look at** whether the whole cloud lies above the line (a real shift), or whether two patients make the
# difference (look at those two).
#
# ## An honest reading
#
# - How many patients tested? Below about 30 an AUC is uncertain by 0.1 and more, whatever you do.
# - Were the settings chosen on the test patients? Here they were not chosen at all. Trying ten settings and showing the
#   best is the commonest way to a result that nobody can repeat.
# - When this page was made, ImageNet had the highest mean with all labels (0.68 against 0.40 as a probe), and the
#   interval of the difference still included zero: 17 test patients cannot tell 0.28 from chance. Nor was own
#   pretraining ahead anywhere, and it could not be: it saw some thirty X-rays for a minute. `docs/results.md` shows
#   what happens on real scans.
#
# The page with all pictures, calibration and run times: `medclr_work/.../comparison/report.html`. The same command on
# your scans:
#
# ```
# medclr compare --config compare.yaml --out comparison
# ```
#
# ## One model to use
#
# A comparison keeps predictions, not weights. This trains one model on all labelled training patients, and asks it
# about a scan. The model knows from which patients it learnt: `learnt_from` in the table warns of them.

# %%
model = WORK / "classifier"
settings = {"steps": STEPS, "batch": 8, "size_px": SIZE_PX * 2 // 3}
print(medclr.finetune(WORK / "store", model, task="classify", encoder=str(run), settings=settings))

# %%
from medclr.data.manifest import read_manifest

manifest = read_manifest(WORK / "scans.csv", key)
tested = [row.scan_id for row in manifest.rows if row.split == "test"][:6]
paths = [manifest.files[scan].image for scan in tested]
paths = [files[0] if len(files) == 1 else files[0].parent for files in paths]
print(medclr.predict(paths, model, WORK / "predicted", modality=MODALITY, key_file=key))
gallery.read_picture(WORK / "predicted/overview.png")

# %% [markdown]
# **Look at** how sure it is. After so few steps and patients the probabilities lie near 0.5, and they should. **Warning
# sign:** 0.99 for everything from a model that has seen ten patients.
