#!/bin/sh
# Build a rival's own virtual environment from the package index: build.sh kvpress|transformers|llama_cpp|onnxruntime_genai FOLDER
set -eu
rival=$1 folder=$2
here=$(dirname "$0")
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --requirement "$here/$rival.txt"
"$folder/bin/pip" freeze --quiet --requirement "$here/$rival.txt" | sed '/^##/,$d'
