# %% [markdown]
# # 3. A few masks: segmentation
#
# Drawing masks takes hours, so there are few. This notebook trains a U-Net on four patients with masks, once after
# pretraining on the scans without masks, and once from nothing. Then it looks: numbers patient by patient, pictures of
# the best and the worst, and the mask of a new scan.
#
# The pretraining is `dense`: it pulls the same point of a slice in two views together and tells it from other points,
# so that encoder and decoder learn *where* things are, not only what is in the picture. On real scans it was ahead
# of random weights with any number of masks: by much with one or two, by little with five or more (`docs/results.md`).
#
# It runs as it is on heads of invented patients (ventricles, and metastases in half of them), in about four minutes on
# two cores. For your own scans, set `SCANS`, `MASKS` and `CLASSES`.

# %% parameters
from pathlib import Path

SCANS = None  # your folder, as in notebook 1; None: heads of phantom patients
MASKS = None  # a folder of NIfTI masks, each named like its scan
CLASSES = {1: "ventricles", 2: "metastases"}  # what the values of the masks mean; {}: each value is a class
MODALITY = None  # "CT", "MR", "XR" or "US", for NIfTI volumes and images whose names do not say it
NEW = None  # a scan to segment in the end; None: one of a patient whom nobody has seen
PATIENTS = 24  # phantom patients, if there are any
EPOCHS = 8  # passes over the slices, in pretraining
BATCH = 32  # slices a step of it
CASES = 4  # patients whose masks are used
STEPS = 120  # of training on them; 300 and more for a result
SIZE_PX = 64  # side of the stored slices; 128 or more for a result

# %% [markdown]
# ## Scans, masks, and an encoder
#
# As in notebook 1, but for the method. Masks stand beside the scans, on the same grid of voxels; one that does not fit
# its scan is refused.

# %%
import medclr
from medclr.data.phantom import write_cohort

WORK = Path("medclr_work") / (SCANS.name if SCANS else "phantom_heads")
scans, masks, key = SCANS, MASKS, None
if SCANS is None:
    cohort, key = WORK / "scans", WORK / "key"
    scans, masks = cohort / "mr", cohort / "mr_masks"
    if not cohort.exists():
        print(write_cohort(cohort, patients=PATIENTS))
        key.write_text("0e" * 32)  # makes the pseudonyms; your own key is drawn on first use
        key.chmod(0o600)
if not (WORK / "store").exists():  # or notebook 1 has made it
    split = "train=0.7,test=0.3"
    found = medclr.index(
        [scans], WORK / "scans.csv", modality=MODALITY, masks=masks, split=split, allow_unmatched=True, key_file=key
    )
    print(found)
    print(medclr.prepare(WORK / "scans.csv", WORK / "store", size_px=SIZE_PX, key_file=key))
run = WORK / "run_dense"
settings = {"method": "dense", "epochs": EPOCHS, "batch": BATCH, "views.size_px": SIZE_PX, "data.split": "train"}
settings |= {"data.slices_per_scan": 8, "monitor.sample": 256, "views.crop_area": [0.5, 1.0], "dense.width": 8}
settings |= {"optim.name": "adamw", "optim.lr": 2e-3, "optim.lr_scaling": "none"}  # for a small batch
print(medclr.pretrain(WORK / "store", run, settings=settings))

# %% [markdown]
# **Look at** the masks on the slices before you train on them. Do they lie where they should? **Warning signs:** a mask
# that is shifted, mirrored or upside down against its scan (then the two files disagree about the patient's
# orientation), and slices on which somebody forgot to draw.

# %%
import numpy as np

from medclr import gallery
from medclr.data.store import Store

store = Store(WORK / "store")
is_drawn = np.concatenate([store.masks(part).any((1, 2)) for part in np.array_split(np.arange(len(store)), 8)])
drawn = np.flatnonzero(is_drawn)
gallery.overlays(store, drawn[:: max(1, len(drawn) // 12)][:12], names=CLASSES)

# %% [markdown]
# ## Train twice
#
# The same patients, steps and settings; only the start differs. Encoder and decoder of the run become the two halves of
# a U-Net; the last layer, which names the classes, is new. `match.txt` in the run's folder says what was loaded.

# %%
settings = {"steps": STEPS, "batch": 8, "lr": 5e-3, "segment.width": 8}  # a small decoder, as in the run
if CLASSES:
    settings |= {"segment.labels": [*CLASSES], "segment.names": [*CLASSES.values()]}
runs = {"random": WORK / "unet_random", "own pretraining": WORK / "unet_pretrained"}
for name, out in runs.items():
    encoder = str(run) if name == "own pretraining" else "random"
    done = medclr.finetune(WORK / "store", out, task="segment", encoder=encoder, cases=str(CASES), settings=settings)
    print(f"{name}: {done}")

# %% [markdown]
# **Look at** the brackets: 95 % intervals over the test patients. **Dice** is the overlap with the mask drawn by hand:
# 0 is none, 1 is all. **HD95** is how far the two outlines lie apart, in millimetres; less is better. Small things
# (metastases) have a low Dice even if they are found, because every voxel at their border counts. Here their Dice is 0:
# four patients and a minute of training are too little to learn them, and no start of the encoder changes that. (HD95
# is then the size of the scan.)
#
# ## The training
#
# **Look at** the loss of both: it must fall and flatten. A loss that still falls steeply at the end asks for more
# `STEPS`, and then the comparison says only who is *faster*.

# %%
from medclr.track import read_metrics

loss = {name: [row["loss"] for row in read_metrics(out)] for name, out in runs.items()}
gallery.scatter({name: (range(1, len(y) + 1), y) for name, y in loss.items()}, "step", "loss")

# %% [markdown]
# ## Patient by patient
#
# A mean hides its worst patient. Each dot is a test patient, above the line he does better with own pretraining. **Look
# at** whether all dots are shifted or only a few. When this page was made, all nine lay above the line for the
# ventricles. Even so: one draw of four patients and one seed are an impression and no result. `medclr compare`
# (notebook 2; `task: segment`) adds draws, budgets and paired intervals.

# %%
from medclr.outcomes import read_outcome

outcomes = {name: read_outcome(out / "predictions.csv") for name, out in runs.items()}
panels = {}
for number, name in enumerate(outcomes["random"].classes):
    both = [outcome.dice[:, number] for outcome in outcomes.values()]  # NaN where neither shows it
    panels[f"Dice of {name}"] = both
gallery.scatter(panels, "random", "own pretraining", diagonal=True)

# %% [markdown]
# The same in numbers, class by class; nan means that neither the mask nor the model shows the class.

# %%
for row, patient in enumerate(outcomes["random"].patient_id):
    print(patient, *(f"{name}: {np.round(outcome.dice[row], 2)}" for name, outcome in outcomes.items()), sep="   ")

# %% [markdown]
# ## Best, median and worst
#
# Areas are the masks drawn by hand, lines are what the model says. **Look at** the worst row first: is it the scan
# (noise, another protocol), the mask (drawn badly?), or the model? **Warning signs:** small islands far outside the
# organ (too few steps, too few slices without it), outlines that follow the edge of the skull instead of the organ.

# %%
gallery.read_picture(runs["own pretraining"] / "figures" / "overlays.png")

# %% [markdown]
# ## A new scan
#
# `predict` reads a scan as it comes, and writes its mask as a NIfTI on the scan's own grid, so that any viewer can lay
# one over the other (DICOM scans get a DICOM SEG besides).

# %%
import nibabel

if NEW is None and SCANS is None:
    if not (WORK / "new").exists():
        write_cohort(WORK / "new", patients=2, seed=1)  # other patients, on other scanners
    NEW = WORK / "new/mr/sub-001_T1w.nii.gz"
if NEW is None:
    from medclr.data.manifest import read_manifest

    manifest = read_manifest(WORK / "scans.csv", key)
    files = manifest.files[next(row.scan_id for row in manifest.rows if row.split == "test")].image
    NEW = files[0] if len(files) == 1 else files[0].parent
print(medclr.predict([NEW], runs["own pretraining"], WORK / "predicted", modality=MODALITY, key_file=key))
gallery.read_picture(WORK / "predicted" / "overview.png")

# %%
mask = nibabel.load(next((WORK / "predicted" / "masks").glob("*.nii.gz")))
print("the mask:", mask.shape, "voxels of", np.round(mask.header.get_zooms(), 2), "mm")
if NEW.name.endswith((".nii", ".nii.gz")):
    scan = nibabel.load(NEW)
    print("the scan:", scan.shape, "voxels; the same grid:", np.allclose(scan.affine, mask.affine, atol=1e-3))
for value, name in CLASSES.items():
    millilitres = (np.asarray(mask.dataobj) == value).sum() * np.prod(mask.header.get_zooms()[:3]) / 1000
    print(f"{name}: {millilitres:.1f} ml")

# %% [markdown]
# **Look at** the volumes: are they possible for a human? It is the cheapest check there is, and it finds most failures
# of a model on scans of another scanner.
#
# ## Next
#
# More steps, larger slices and more masks. Then compare: `task: segment` in a file like `configs/compare/phantom.yaml`.
