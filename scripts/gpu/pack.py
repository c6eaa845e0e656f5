#!/usr/bin/env python3
"""What is built, into a folder for another machine.

    pack.py programs MESSAGES FOLDER KERNELS    copies the programs that cargo's messages name into FOLDER, and the
                                                kernels' images into KERNELS; prints toolkit and architectures
    pack.py parts DIR FOLDER...                 takes apart the programs in these folders of DIR, for machine.sh to assemble
"""

import gzip
import json
import pathlib
import shutil
import sys


def programs(messages, folder, kernels):
    folder.mkdir(parents=True)
    kernels.mkdir(parents=True, exist_ok=True)
    for line in open(messages, encoding="utf-8"):
        message = json.loads(line) if line.startswith("{") else {}
        if message.get("reason") == "build-script-executed":
            built = dict(message["env"])
            if "GRADBLEND_TOOLKIT" in built:
                images, about = pathlib.Path(message["out_dir"]), built
        elif message.get("executable"):
            target = message["target"]
            name = "lib" if "lib" in target["kind"] else target["name"]
            shutil.copy2(message["executable"], folder / name)
    for image in images.glob("*.fatbin"):  # of OUT_DIR
        shutil.copy2(image, kernels)
    print("toolkit      ", about["GRADBLEND_TOOLKIT"])
    print("architectures", about["GRADBLEND_ARCHITECTURES"])


def parts(out, folders):
    """Many programs have the same machine code in them, which is most of their size. The folder holds it once, and
    run.sh puts it back: a line of parts/list is a program, bytes of what is in parts/PROGRAM.gz, and images in between."""
    images = {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "kernels").rglob("*.fatbin"))}
    lines = []
    for folder in folders:
        (out / "parts" / folder).mkdir(parents=True)
        for path in sorted((out / folder).iterdir()):
            data, rest, at, line = path.read_bytes(), b"", 0, [f"{folder}/{path.name}"]
            found = sorted((data.find(image), name) for name, image in images.items() if image in data)
            for start, name in found:
                line += [str(start - at), name]
                rest += data[at:start]
                at = start + len(images[name])
            rest += data[at:]
            lines.append(" ".join([*line, str(len(data) - at)]) + "\n")
            (out / "parts" / folder / f"{path.name}.gz").write_bytes(gzip.compress(rest, mtime=0))
            path.unlink()
        (out / folder).rmdir()
    (out / "parts" / "list").write_text("".join(lines))
    for name, image in images.items():
        (out / f"{name}.gz").write_bytes(gzip.compress(image, mtime=0))
        (out / name).unlink()


def main():
    what, *arguments = sys.argv[1:] or ["help"]
    if what == "programs" and len(arguments) == 3:
        programs(*map(pathlib.Path, arguments))
    elif what == "parts" and len(arguments) > 1:
        parts(pathlib.Path(arguments[0]), arguments[1:])
    else:
        sys.exit(__doc__)


main()
