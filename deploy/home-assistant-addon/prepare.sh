#!/bin/sh
# Builds the wheel of this source tree into the folder wheels, beside the hashes of what it needs, for the add-on's Dockerfile.
# Then copy this folder to /addons/cesar_mqtt on the Home Assistant machine.
#   prepare.sh            (PYTHON=... chooses the Python whose pip is used)
set -eu

cd "$(dirname "$0")"
mkdir -p wheels
rm -f wheels/*.whl
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir wheels ../..
cp ../../pyproject.toml ../../requirements/build.txt ../../requirements/all.txt wheels/
echo "ready: copy $(pwd) to /addons/cesar_mqtt"
