"""Body Part Examined as a defined term of PS3.16 annex L, or nothing: free text could name somebody."""

import re

_WORDS = """
abdomen adrenal ankle aorta arm axilla back bladder brain breast bronchus buttock calcaneus calf carotid cerebellum
cervix cheek chest clavicle coccyx colon cornea duodenum ear elbow esophagus extremity eye eyelid face femur finger
foot gallbladder hand head heart hip humerus ileum ilium jaw jejunum kidney knee larynx leg liver lung mandible maxilla
mediastinum mouth neck nose orbit ovary pancreas parotid patella pelvis penis pharynx prostate rectum rib scalp scapula
sclera scrotum shoulder skull spine spleen sternum stomach submandibular testis thigh thumb thymus thyroid toe tongue
trachea ureter urethra uterus vagina vulva wrist zygoma
"""
_BODY_PARTS = {word.upper(): word for word in _WORDS.split()} | {
    "ABDOMENPELVIS": "abdomen and pelvis",
    "CHESTABDOMEN": "chest and abdomen",
    "CHESTABDPELVIS": "chest abdomen and pelvis",
    "CIRCLEOFWILLIS": "circle of willis",
    "CORONARYARTERY": "coronary artery",
    "CSPINE": "cervical spine",
    "CTSPINE": "cervicothoracic spine",
    "HEADNECK": "head and neck",
    "IAC": "internal auditory canal",
    "LSPINE": "lumbar spine",
    "LSSPINE": "lumbosacral spine",
    "NECKCHEST": "neck and chest",
    "NECKCHESTABDOMEN": "neck chest and abdomen",
    "NECKCHESTABDPELV": "neck chest abdomen and pelvis",
    "SSPINE": "sacral spine",
    "THORAX": "chest",
    "TLSPINE": "thoracolumbar spine",
    "TMJ": "temporomandibular joint",
    "TSPINE": "thoracic spine",
    "WHOLEBODY": "whole body",
}


def body_part(text: str) -> str:
    """The defined term in lower case, spaces and punctuation of ``text`` set aside; '' if it is none."""
    return _BODY_PARTS.get(re.sub("[^A-Z]", "", text.upper()), "")
