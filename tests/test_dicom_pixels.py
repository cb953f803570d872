"""Pixels of DICOM: stored values written here, and the physical values that the standard says they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import CT, NOWHERE, XRAY, ramp, sequence, write
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from medclr.errors import ScanError
from medclr.scans import dicom
from medclr.scans.modality import Window

US = {"Modality": "US", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", **NOWHERE}


def read(path: Path, stored: NDArray[Any], **elements: Any) -> NDArray[np.float32]:
    """[H,W] of the file that is written."""
    return dicom.read([write(path, stored, **elements)]).voxels[0]


@pytest.mark.parametrize(("dtype", "low", "high"), [("uint8", 0, 255), ("int8", -128, 127), ("uint16", 0, 65535),
                                                    ("int16", -32768, 32767)])  # fmt: skip
def test_signed_and_unsigned_integers_are_exact(tmp_path: Path, dtype: str, low: int, high: int) -> None:
    stored = np.array([[low, low + 1, -1 if low else 1, 0, high - 1, high]], dtype)
    np.testing.assert_array_equal(read(tmp_path / "a", stored), stored.astype(np.float64))
    rescaled = read(tmp_path / "b", stored, RescaleSlope="0.25", RescaleIntercept="-7.5")
    np.testing.assert_array_equal(rescaled, (stored * 0.25 - 7.5).astype(np.float32))


def test_sign_is_extended_from_bits_stored(tmp_path: Path) -> None:
    expected = ramp("int16", -2048, 2047)
    path = write(tmp_path / "a", expected & 0x0FFF, BitsStored=12, PixelRepresentation=1)
    np.testing.assert_array_equal(dicom.read([path]).voxels[0], expected)


def test_overlay_bits_are_masked_and_unexplained_ones_refused(tmp_path: Path) -> None:
    expected = ramp("uint16", 0, 4095)
    dirty = expected | (np.arange(12, dtype=np.uint16).reshape(3, 4) % 2 << 15)
    path = write(tmp_path / "a", dirty, BitsStored=12)
    with pytest.raises(ScanError, match="more than the 12 Bits Stored"):
        dicom.read([path])
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x60000100, "US", 16)
    dataset.add_new(0x60000102, "US", 15)
    dataset.save_as(path)
    np.testing.assert_array_equal(dicom.read([path]).voxels[0], expected)


def test_monochrome1_is_turned_round_after_the_rescale(tmp_path: Path) -> None:
    stored = ramp("uint16", 5, 1000)
    elements = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 10, "RescaleSlope": 2, "RescaleIntercept": 50}
    scan = dicom.read([write(tmp_path / "a", stored, **XRAY | elements)])
    lowest, highest = 50, 2 * 1023 + 50
    np.testing.assert_array_equal(scan.voxels[0], lowest + highest - (2.0 * stored + 50))

    measured = write(tmp_path / "b", stored, **CT | {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 10})
    np.testing.assert_array_equal(dicom.read([measured]).voxels[0], stored - 1024.0)  # white bone or black, same tissue


def test_monochrome1_of_signed_pixels_keeps_their_range(tmp_path: Path) -> None:
    stored = np.array([[-512, -1, 0, 511]], np.int16)
    turned = read(tmp_path / "a", stored, BitsStored=10, PhotometricInterpretation="MONOCHROME1", **XRAY)
    assert turned.tolist() == [[511, 0, -1, -512]]


def test_modality_lut_sequence(tmp_path: Path) -> None:
    table = sequence({"LUTDescriptor": [4, 10, 16], "LUTData": [7, 70, 700, 7000]})
    stored = np.array([[0, 10, 11, 12, 13, 99]], np.uint16)
    expected = [7, 7, 70, 700, 7000, 7000]
    assert read(tmp_path / "a", stored, ModalityLUTSequence=table, **XRAY).tolist() == [expected]
    elements = {"ModalityLUTSequence": table, "PhotometricInterpretation": "MONOCHROME1", **XRAY}
    assert read(tmp_path / "b", stored, **elements).tolist() == [[65535 - value for value in expected]]
    narrow = sequence({"LUTDescriptor": [4, 10, 12], "LUTData": [0, 5, 50, 4095]})
    turned = read(tmp_path / "c", stored, **elements | {"ModalityLUTSequence": narrow})
    assert turned.tolist() == [[4095, 4095, 4090, 4045, 0, 0]]
    narrow[0].LUTData = narrow[0].LUTData[:3]
    with pytest.raises(ScanError, match="a Modality LUT of 3 values and announces 4"):
        read(tmp_path / "d", stored, ModalityLUTSequence=narrow, **XRAY)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_modality_lut_of_bytes_or_words(tmp_path: Path, syntax: str, dtype: str) -> None:
    table = sequence({"LUTDescriptor": [4, 0, 8], "LUTData": 0})
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    table[0].add_new("LUTData", "OW", np.array([9, 8, 7, 250], f"{order}{dtype}").tobytes())
    stored = np.array([[0, 1, 2, 3]], np.uint16)
    assert read(tmp_path / "a", stored, syntax=syntax, ModalityLUTSequence=table, **XRAY).tolist() == [[9, 8, 7, 250]]


@pytest.mark.parametrize(
    ("elements", "window"),
    [
        ({}, None),
        ({"WindowCenter": 40, "WindowWidth": 400}, (40, 400)),
        ({"WindowCenter": [40, -600], "WindowWidth": [400, 1500]}, (40, 400)),
        ({"WindowCenter": 40, "WindowWidth": 0}, None),
        ({"VOILUTSequence": sequence({"LUTDescriptor": [256, 100, 8], "LUTData": list(range(256))})}, (228, 256)),
    ],
)
def test_the_window_of_the_file_is_kept_for_display(
    tmp_path: Path, elements: dict[str, Any], window: tuple[float, float] | None
) -> None:
    expected = window and Window("file", *window)
    path = write(tmp_path / "a", ramp("uint16", 0, 4095), **CT | elements)
    assert dicom.read([path]).window == expected
    np.testing.assert_array_equal(dicom.read([path]).voxels[0], ramp("uint16", 0, 4095) - 1024.0)  # not applied

    white_low = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "RescaleSlope": 2, "RescaleIntercept": 1}
    path = write(tmp_path / "b", ramp("uint16", 0, 4095), **XRAY | white_low | elements)
    turned = expected and Window("file", (1 + 2 * 4095 + 1) - expected.center, expected.width)
    assert dicom.read([path]).window == turned


def test_the_window_of_a_volume_is_that_of_its_middle_slice(tmp_path: Path) -> None:
    files = [
        write(tmp_path / str(9 - i), ramp("uint16", 0, 99), ImagePositionPatient=[0, 0, 3 * i], WindowCenter=100 + i,
              WindowWidth=50)
        for i in range(5)
    ]  # fmt: skip
    assert dicom.read(files).window == Window("file", 102, 50)


def test_colour_becomes_luminance(tmp_path: Path) -> None:
    rgb = np.random.RandomState(0).randint(0, 256, (4, 6, 3)).astype(np.uint8)
    expected = rgb @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read(tmp_path / "a", rgb, **US), expected, rtol=1e-6)
    luma = rgb.copy()
    luma[..., 1:] = 128  # grey in YBR_FULL: the luminance is Y
    full = read(tmp_path / "b", luma, PhotometricInterpretation="YBR_FULL", **US)
    np.testing.assert_allclose(full, luma[..., 0], atol=1)
    with pytest.raises(ScanError, match="colours of more than the 4 Bits Stored"):
        read(tmp_path / "d", rgb, BitsStored=4, **US)
    deep = (rgb.astype(np.uint16) << 8) + 7
    np.testing.assert_allclose(read(tmp_path / "c", deep, **US), deep @ [0.299, 0.587, 0.114], rtol=1e-6)


def test_subsampled_colour_becomes_luminance(tmp_path: Path) -> None:
    """YBR_FULL_422 stores two luminances and one chrominance pair for two pixels: 2 bytes a pixel, not 3."""
    path = write(tmp_path / "a", np.zeros((2, 4, 3), np.uint8), PhotometricInterpretation="YBR_FULL_422", **US)
    dataset = pydicom.dcmread(path)
    luma = np.array([[10, 20, 30, 40], [50, 60, 70, 80]], np.uint8)
    pairs = [[a, b, 128, 128] for a, b in luma.reshape(-1, 2)]
    dataset.PixelData = np.array(pairs, np.uint8).tobytes()
    dataset.save_as(path)
    np.testing.assert_allclose(dicom.read([path]).voxels[0], luma, atol=1)


def test_palette_becomes_luminance(tmp_path: Path) -> None:
    palette = np.random.RandomState(0).randint(0, 256, (3, 256)).astype(np.uint8)
    elements: dict[str, Any] = {}
    for name, colours in zip(("Red", "Green", "Blue"), palette, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        elements[f"{name}PaletteColorLookupTableData"] = colours.tobytes()
    stored = np.array([[0, 1, 2], [128, 254, 255]], np.uint8)
    values = read(tmp_path / "a", stored, PhotometricInterpretation="PALETTE COLOR", **US, **elements)
    np.testing.assert_allclose(values, np.moveaxis(palette[:, stored], 0, -1) @ [0.299, 0.587, 0.114], rtol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_float_and_double_pixels(tmp_path: Path, name: str, dtype: str) -> None:
    values = np.array([[-1.5, 0, 1e-3], [3.25, 1e6, 2**24]], dtype)
    path = write(tmp_path / "a", values, PixelRepresentation=None, BitsStored=None)
    dataset = pydicom.dcmread(path)
    setattr(dataset, name, dataset.PixelData)
    del dataset.PixelData
    dataset.save_as(path)
    np.testing.assert_array_equal(dicom.read([path]).voxels[0], values.astype(np.float32))
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.save_as(path)
    with pytest.raises(ScanError, match="no highest value"):
        dicom.read([path])


def test_float_pixels_that_are_nan_are_air_and_infinite_ones_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", np.zeros((1, 3), np.float32), PixelRepresentation=None, BitsStored=None)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.FloatPixelData = np.array([-2, np.nan, 5], "<f4").tobytes()
    dataset.save_as(path)
    scan = dicom.read([path])
    assert scan.voxels.ravel().tolist() == [-2, 0, 5]
    assert scan.irregular == "1 of its 3 voxels are NaN, taken as air"
    dataset.FloatPixelData = np.array([-2, np.inf, 5], "<f4").tobytes()
    dataset.save_as(path)
    with pytest.raises(ScanError, match="infinite"):
        dicom.read([path])


def test_one_bit_images_are_read_and_one_bit_segmentations_refused(tmp_path: Path) -> None:
    bits = np.random.RandomState(0).randint(0, 2, (2, 3, 8)).astype(np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little")  # PS3.5 8.1.1: first pixel, lowest bit
    shape: dict[str, Any] = {"Rows": 3, "Columns": 8, "NumberOfFrames": 2, "BitsAllocated": 1, "BitsStored": 1}
    other = {"Modality": "OT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.1", **NOWHERE, **shape}
    scan = dicom.read([write(tmp_path / "a", packed.reshape(1, 1, -1), **other)])
    np.testing.assert_array_equal(scan.voxels, bits)
    segments = write(
        tmp_path / "b", packed.reshape(1, 1, -1), **other | {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}
    )
    with pytest.raises(ScanError, match="is a segmentation object"):
        dicom.read([segments])


@pytest.mark.parametrize(
    ("modality", "kind"), [("PT", "1.2.840.10008.5.1.4.1.1.128"), ("NM", "1.2.840.10008.5.1.4.1.1.20")]
)
def test_activity_is_rescaled_and_no_uptake_value_is_computed(tmp_path: Path, modality: str, kind: str) -> None:
    stored = ramp("uint16", 0, 32767)
    values = read(tmp_path / "a", stored, Modality=modality, SOPClassUID=kind, RescaleSlope="0.37", RescaleIntercept=0,
                  Units="BQML", PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    np.testing.assert_array_equal(values, (stored * 0.37).astype(np.float32))  # white or black, the same activity


def test_spacing_of_radiographs_is_the_calibrated_one(tmp_path: Path) -> None:
    def spacing(name: str, **elements: Any) -> tuple[float, float, float]:
        return dicom.read([write(tmp_path / name, ramp("uint16", 0, 9), **XRAY | elements)]).spacing_mm

    assert spacing("a", PixelSpacing=[0.2, 0.1], ImagerPixelSpacing=[0.3, 0.3]) == (1, 0.2, 0.1)
    assert spacing("b", PixelSpacing=None, ImagerPixelSpacing=[0.3, 0.25]) == (1, 0.3, 0.25)
    assert spacing("c", PixelSpacing=None, NominalScannedPixelSpacing=[0.15, 0.15]) == (1, 0.15, 0.15)
    assert spacing("d", PixelSpacing=None) == (1, 1, 1)


REGION = {"PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3, "PhysicalDeltaX": 0.02, "PhysicalDeltaY": -0.03}


@pytest.mark.parametrize(
    ("regions", "spacing_mm"),
    [
        ([REGION], (1, 0.3, 0.2)),
        ([REGION, REGION], (1, 0.3, 0.2)),
        ([REGION, REGION | {"PhysicalDeltaX": 0.04}], (1, 1, 1)),
        ([REGION, REGION | {"PhysicalUnitsXDirection": 4}], (1, 1, 1)),  # a trace over seconds
        ([REGION | {"PhysicalDeltaX": 0.0}], (1, 1, 1)),
        ([], (1, 1, 1)),
    ],
)
def test_spacing_of_ultrasound_is_that_of_its_regions(
    tmp_path: Path, regions: list[dict[str, Any]], spacing_mm: tuple[float, float, float]
) -> None:
    path = write(tmp_path / "a", ramp("uint8", 0, 9), PixelSpacing=None, SequenceOfUltrasoundRegions=sequence(*regions),
                 **US)  # fmt: skip
    assert dicom.read([path]).spacing_mm == pytest.approx(spacing_mm)


def test_a_cine_loop_is_one_scan_of_frames_without_geometry(tmp_path: Path) -> None:
    frames = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    path = write(tmp_path / "a", frames, NumberOfFrames=3, SequenceOfUltrasoundRegions=sequence(REGION), **US)
    (found,), _ = dicom.find([dicom.read_header(path)])
    assert (found.shape, found.plane) == ((3, 4, 5), "")
    assert found.irregular == "3 frames in the order of the file, not a volume"
    scan = dicom.read([path])
    np.testing.assert_array_equal(scan.voxels, frames)
    assert scan.spacing_mm == pytest.approx((1, 0.3, 0.2))
    assert scan.irregular == found.irregular


@pytest.mark.parametrize(
    ("stored", "elements", "expected"),
    [
        ([-2000, -1000, 0, 40], {"PixelPaddingValue": -2000, "RescaleIntercept": 0}, [-1024, -1000, 0, 40]),
        ([-3000, -2500, -2000, 40], {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -3000,
                                     "RescaleIntercept": 0}, [-1024, -1024, -1024, 40]),
        ([-2000, 0, 1024, 1064], {"PixelPaddingValue": -2000, "BitsStored": 12}, [-1024, -1024, 0, 40]),
        ([0, 40, -5, 7], {"PixelPaddingValue": 0, "RescaleIntercept": 0}, [0, 40, -5, 7]),  # 0 is water: left alone
    ],
)  # fmt: skip
def test_padding_becomes_air(tmp_path: Path, stored: list[int], elements: dict[str, Any], expected: list[int]) -> None:
    path = write(tmp_path / "a", np.array([stored], np.int16), **CT | elements)
    assert dicom.read([path]).voxels[0, 0].tolist() == expected


def test_padding_beyond_bits_stored_is_not_mistaken_for_an_overlay(tmp_path: Path) -> None:
    """63536 is -2000 written without a sign into 12 Bits Stored; masked, it would be 2096, a plausible bone."""
    path = write(
        tmp_path / "a", np.array([[63536, 2096, 1024]], np.uint16), BitsStored=12, PixelPaddingValue=63536, **CT
    )
    assert dicom.read([path]).voxels[0, 0].tolist() == [-1024, 1072, 0]
