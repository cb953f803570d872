"""A seeded cohort of phantom patients, written as the files a hospital has: DICOM CT, NIfTI MR with masks, X-ray PNG.

Every patient is drawn from (seed, patient number) alone: patient 7 is the same in a cohort of 8 and of 800, and one
call repeated writes the same bytes. Half of the patients, one of each consecutive pair, carry metastases: nodules in
the lungs, hypodense spots in the liver, dark foci with a bright rim in the brain. Three scanners differ in noise,
sharpness, slice thickness, field of view and intensity scale, and are drawn independently of the lesions.

Shape letters: D slices, H rows, W columns.
"""

import csv
import datetime
import gzip
import io
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from scipy.ndimage import gaussian_filter

from medclr.data.anatomy import AIR, Canvas, Floats, Head, Torso, draw_head, draw_torso, paint_head, paint_torso
from medclr.errors import MedclrError
from medclr.files import writing_folder

LABELS = ("healthy", "lesion")
"""The two values of the label column."""


@dataclass(frozen=True)
class Scanner:
    """One hospital's equipment: what makes the same anatomy look different."""

    model: str
    ct_noise_hu: float
    ct_kernel: str
    ct_blur_px: float
    """Standard deviation of the reconstruction kernel: a sharp one keeps edges, and noise, fine-grained."""
    ct_slice_mm: float
    ct_slices: int
    ct_field_mm: float
    mr_unit: float
    """Stored value of white matter: MR intensities have no unit."""
    mr_noise: float
    """Standard deviation of the noise, white matter = 1."""
    mr_bias: float
    """Relative strength of the receive coil's shading."""
    mr_slice_mm: float
    mr_slices: int
    xr_noise: float
    """Standard deviation of the noise behind the densest part, in attenuation lengths."""
    xr_gamma: float


SCANNERS = (
    Scanner(
        "Alder 16", ct_noise_hu=26, ct_kernel="SHARP", ct_blur_px=0.35, ct_slice_mm=9, ct_slices=32, ct_field_mm=420,
        mr_unit=220, mr_noise=0.030, mr_bias=0.15, mr_slice_mm=3.0, mr_slices=48, xr_noise=0.05, xr_gamma=0.9,
    ),
    Scanner(
        "Birch 64", ct_noise_hu=14, ct_kernel="MEDIUM", ct_blur_px=0.60, ct_slice_mm=10, ct_slices=28, ct_field_mm=400,
        mr_unit=950, mr_noise=0.018, mr_bias=0.30, mr_slice_mm=3.5, mr_slices=40, xr_noise=0.02, xr_gamma=1.1,
    ),
    Scanner(
        "Cedar 4", ct_noise_hu=20, ct_kernel="SOFT", ct_blur_px=0.95, ct_slice_mm=12, ct_slices=24, ct_field_mm=440,
        mr_unit=9000, mr_noise=0.045, mr_bias=0.22, mr_slice_mm=4.0, mr_slices=36, xr_noise=0.08, xr_gamma=1.3,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class CohortSummary:
    """What ``write_cohort`` wrote."""

    folder: Path
    patients: int
    lesions: int
    """How many of the patients carry lesions."""
    ct_slices: int
    mr_volumes: int
    xr_images: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.patients} patients, {self.lesions} of them with lesions: "
            f"{self.ct_slices} CT slices, {self.mr_volumes} MR volumes, {self.xr_images} X-ray images"
        )


# The machines ---------------------------------------------------------------------------------------------------------


def scan_ct(torso: Torso, scanner: Scanner, size_px: int, rng: np.random.Generator) -> Floats:
    """Hounsfield units [D,H,W], from feet to head, on the scanner's table."""
    pixel_mm = scanner.ct_field_mm / size_px
    across, up = _centers(size_px, pixel_mm), _centers(scanner.ct_slices, scanner.ct_slice_mm) + 6
    aside_mm, lift_mm = rng.uniform(-8, 8), rng.uniform(-8, 4)  # nobody lies exactly in the middle
    canvas = Canvas(
        up / torso.size[2], (across - lift_mm) / torso.size[1], (across - aside_mm) / torso.size[0], AIR, pixel_mm
    )
    paint_torso(canvas, torso)
    back = 104 + torso.muscle_mm + torso.fat_mm
    table = np.abs(np.sqrt(canvas.x**2 + (canvas.y - back + 420) ** 2) - 427) - 5
    canvas.paint(canvas.inside(np.maximum(table, np.abs(canvas.x) - 185)), -850)  # foam
    canvas.paint(canvas.inside(np.maximum(np.abs(table + 1), np.abs(canvas.x) - 186)), -250)  # shell
    blur = (0, scanner.ct_blur_px, scanner.ct_blur_px)
    noise = gaussian_filter(rng.standard_normal(canvas.values.shape, np.float32), blur)
    noise *= scanner.ct_noise_hu / noise.std() * np.clip(1 + canvas.values / 1000, 0.35, 1)
    hu: Floats = gaussian_filter(canvas.values, blur) + noise
    return hu


def scan_mr(
    head: Head, scanner: Scanner, size_px: int, rng: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]:
    """Intensities and mask, [W,H,D] as NIfTI stores them, and the affine to RAS+ millimetres, a little oblique."""
    pixel_mm = 211.2 / size_px
    across, up = _centers(size_px, pixel_mm), _centers(scanner.mr_slices, scanner.mr_slice_mm)
    canvas = Canvas(up / head.size[2], across / head.size[1], across / head.size[0], 0.0, pixel_mm)
    mask = paint_head(canvas, head, rng)
    z, y, x = canvas.z / 70, canvas.y / 90, canvas.x / 70
    tilt = rng.normal(0, 0.5, 4)
    slopes = tilt[0] * x + tilt[1] * y + tilt[2] * z + tilt[3] * (x**2 + y**2)
    shading = np.exp(scanner.mr_bias * slopes.astype(np.float32))
    noise = scanner.mr_noise * rng.standard_normal((2, *mask.shape), np.float32)
    signal = gaussian_filter(canvas.values, (0, 0.4, 0.4)) * shading
    magnitude = np.hypot(signal + noise[0], noise[1])  # Rician: the magnitude of a complex signal
    pitch, yaw = np.radians(rng.uniform(2, 12)), np.radians(rng.uniform(-5, 5))
    affine = np.eye(4)
    affine[:3, :3] = (
        np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        @ np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
        @ np.diag([pixel_mm, pixel_mm, scanner.mr_slice_mm])
    )
    affine[:3, 3] = -affine[:3, :3] @ ((np.array([size_px, size_px, scanner.mr_slices]) - 1) / 2)
    return np.rint(magnitude * scanner.mr_unit).astype(np.int16).T, mask.T, affine


def scan_xr(torso: Torso, scanner: Scanner, size_px: int, rng: np.random.Generator) -> NDArray[np.uint16]:
    """A frontal radiograph [H,W], bone white: the line integral of attenuation (Beer-Lambert) from back to front."""
    pixel_mm, ray_mm = 380 / size_px, 5.5
    across, up, along = _centers(size_px, pixel_mm), _centers(size_px, pixel_mm)[::-1] + 60, _centers(54, ray_mm)
    across, up = across - rng.uniform(-8, 8), up + rng.uniform(-10, 10)
    rows = []
    for start in range(0, size_px, 14):  # in bands that stay in the processor's cache
        band = up[start : start + 14][::-1] / torso.size[2]
        canvas = Canvas(band, along / torso.size[1], across / torso.size[0], AIR, 1.5 * pixel_mm)
        paint_torso(canvas, torso)
        # Water attenuates 0.02 / mm at 70 keV; calcium more than its Hounsfield units at a CT's harder beam say.
        attenuation = 0.02 * (1 + canvas.values / 1000) + 0.02 * np.clip((canvas.values - 200) / 1000, 0, None)
        rows.append(attenuation.sum(1)[::-1] * ray_mm)
    depth = np.concatenate(rows)  # attenuation lengths [H,W]
    photons = np.exp(-(depth - depth.max()))
    depth = depth + scanner.xr_noise * rng.standard_normal(depth.shape) / np.sqrt(photons)
    depth += 0.5 * (depth - gaussian_filter(depth, size_px / 16))  # the maker's contrast equalisation
    shown: Floats = 1 / (1 + np.exp(-(depth - 3.5) / 1.1))  # the film's characteristic curve
    pixels: NDArray[np.uint16] = np.rint(shown**scanner.xr_gamma * 65535).astype(np.uint16)
    return pixels


def _centers(count: int, step_mm: float) -> Floats:
    return (np.arange(count) - (count - 1) / 2) * step_mm


# The files ------------------------------------------------------------------------------------------------------------


def write_cohort(out: Path, *, patients: int = 24, seed: int = 0, size_px: int = 160) -> CohortSummary:
    """Write the phantom cohort into the new folder ``out``.

    ``ct/sub-001/*.dcm`` (one CT series a patient), ``mr/sub-001_T1w.nii.gz``, ``mr_masks/sub-001_T1w.nii.gz``
    (0 background, 1 ventricles, 2 metastases), ``xr/sub-001_dx.png`` (16-bit), and ``labels.csv``
    (``patient_id,label``) that serves all three.

    Args:
        out: a folder that does not exist yet, or is empty.
        patients: how many.
        seed: another seed, other patients.
        size_px: rows and columns of a CT slice; MR slices have 0.6 and radiographs 1.4 times as many.

    Raises:
        MedclrError: a count makes no sense, ``out`` holds something already, or the disk is full; nothing is left.
    """
    if patients < 1 or seed < 0 or not 32 <= size_px <= 1024:
        raise MedclrError(
            f"a phantom cohort needs patients >= 1, seed >= 0 and size_px from 32 to 1024, "
            f"not patients={patients}, seed={seed}, size_px={size_px}"
        )
    rows, slices = [], 0
    with writing_folder(out) as folder:
        for name in ("ct", "mr", "mr_masks", "xr"):
            (folder / name).mkdir()
        for number in range(1, patients + 1):
            patient_id, lesion, scanner = f"sub-{number:03d}", has_lesion(seed, number), _scanner(seed, number)
            torso = draw_torso(_rng("torso", seed, number), lesion)
            hu = scan_ct(torso, scanner, size_px, _rng("ct", seed, number))
            _write_series(folder / "ct" / patient_id, hu, scanner, seed, number)
            head = draw_head(_rng("head", seed, number), lesion)
            volume, mask, affine = scan_mr(head, scanner, round(0.6 * size_px), _rng("mr", seed, number))
            _write_nifti(folder / "mr" / f"{patient_id}_T1w.nii.gz", volume, affine)
            _write_nifti(folder / "mr_masks" / f"{patient_id}_T1w.nii.gz", mask, affine)
            image = Image.fromarray(scan_xr(torso, scanner, round(1.4 * size_px), _rng("xr", seed, number)))
            image.save(folder / "xr" / f"{patient_id}_dx.png", compress_level=1)
            rows.append((patient_id, LABELS[lesion]))
            slices += scanner.ct_slices
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("patient_id", "label"), *rows])
    lesions = sum(label == "lesion" for _, label in rows)
    return CohortSummary(out, patients, lesions, ct_slices=slices, mr_volumes=patients, xr_images=patients)


def has_lesion(seed: int, number: int) -> bool:
    """Whether patient ``number`` (from 1) carries lesions: exactly one of 1 and 2, one of 3 and 4, and so on."""
    pair, second = divmod(number - 1, 2)
    return bool(_rng("pair", seed, pair).integers(2) == second)


def _scanner(seed: int, number: int) -> Scanner:
    return SCANNERS[_rng("scanner", seed, number).integers(len(SCANNERS))]


def _rng(purpose: str, seed: int, number: int) -> np.random.Generator:
    """A generator of its own for each purpose and patient: no draw depends on how many others were made."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), seed, number])


def _uid(*parts: object) -> UID:
    """A UID derived from a UUID (PS3.5 B.2), itself derived from ``parts``: the same parts, the same UID."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, ' '.join(map(str, ('medclr phantom', *parts)))).int}")


def _write_nifti(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_series(folder: Path, hu: Floats, scanner: Scanner, seed: int, number: int) -> None:
    """Write [D,H,W] Hounsfield units as a CT Image Storage series (PS3.3 A.3), 12 bits stored.

    Neither file names nor InstanceNumber follow the slices: only ImagePositionPatient says where a slice lies.
    """
    folder.mkdir()
    rng = _rng("series", seed, number)
    stored = np.clip(np.rint(hu) + 1024, 0, 4095).astype("<u2")
    pixel_mm = scanner.ct_field_mm / hu.shape[2]
    corner = _centers(hu.shape[2], pixel_mm)[0]
    bottom = float(rng.integers(-900, -400))
    ds = _series_dataset(scanner, seed, number, pixel_mm, hu.shape)
    file_numbers, instances = rng.permutation(len(hu)) + 1, rng.permutation(len(hu)) + 1
    for d, pixels in enumerate(stored):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = _uid(seed, number, "instance", d)
        ds.InstanceNumber = int(instances[d])
        ds.ImagePositionPatient = [corner, corner, bottom + d * scanner.ct_slice_mm]
        ds.SliceLocation = ds.ImagePositionPatient[2]
        ds.PixelData = pixels.tobytes()
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
        (folder / f"IM{file_numbers[d]:04d}.dcm").write_bytes(buffer.getvalue())


def _series_dataset(scanner: Scanner, seed: int, number: int, pixel_mm: float, shape: Sequence[int]) -> Dataset:
    """All that the slices of a series share."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = _uid("implementation")
    ds.file_meta.ImplementationVersionName = "MEDCLR_PHANTOM"
    day = (datetime.date(2020, 1, 1) + datetime.timedelta(days=number)).strftime("%Y%m%d")
    # Patient, General Study (PS3.3 C.7.1.1, C.7.2.1)
    ds.PatientName, ds.PatientID = f"PHANTOM^{number:03d}", f"sub-{number:03d}"
    ds.PatientBirthDate, ds.PatientSex = "19500101", "O"
    ds.StudyInstanceUID, ds.StudyID, ds.AccessionNumber = _uid(seed, number, "study"), "1", ""
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.ReferringPhysicianName = ""
    # General Series, Frame of Reference, General Equipment (C.7.3.1, C.7.4.1, C.7.5.1)
    ds.Modality, ds.SeriesInstanceUID, ds.SeriesNumber = "CT", _uid(seed, number, "series"), 1
    ds.SeriesDescription, ds.BodyPartExamined, ds.PatientPosition = "Phantom chest and abdomen", "CHESTABDOMEN", "HFS"
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = _uid(seed, number, "frame"), ""
    ds.Manufacturer, ds.ManufacturerModelName = "medclr phantom", scanner.model
    # CT Image, Contrast/Bolus (C.8.2.1, C.7.6.4)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.AcquisitionNumber, ds.KVP, ds.ConvolutionKernel = 1, 120, scanner.ct_kernel
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    ds.ContrastBolusAgent = "Iodine"
    # Image Plane (C.7.6.2)
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [pixel_mm, pixel_mm]
    ds.SliceThickness = ds.SpacingBetweenSlices = scanner.ct_slice_mm
    # Image Pixel (C.7.6.3), VOI LUT (C.11.2), SOP Common (C.12.1)
    _, ds.Rows, ds.Columns = shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.WindowCenter, ds.WindowWidth = 40, 400
    ds.SOPClassUID = CTImageStorage
    return ds
