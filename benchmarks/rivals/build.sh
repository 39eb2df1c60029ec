#!/bin/sh
# Build a rival's own virtual environment from the package index: build.sh kvpress FOLDER
set -eu
rival=$1 folder=$2
here=$(dirname "$0")
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --requirement "$here/$rival.txt"
"$folder/bin/python" -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
