"""This file is where the storage gets photos of two subjects to try a campaign with: a folder each, with its class."""

import io
import os

from cluster.storage import Storage
from pocket.subject import subject_photos

ROOT = os.environ.get("RAYBOOTH_PHOTOS", "s3://raybooth/photos")

for name, noun, seed in (("satchel", "backpack", 7), ("robo", "robot", 11)):
    folder = Storage(f"{ROOT}/{name}")
    for i, photo in enumerate(subject_photos(noun, seed)):
        png = io.BytesIO()
        photo.save(png, "PNG")
        folder.write(f"{i}.png", png.getvalue())
    folder.write("subject.yaml", f"class: {noun}\n".encode())
    print(f"{folder.uri}: photos of {name}, a {noun}")
