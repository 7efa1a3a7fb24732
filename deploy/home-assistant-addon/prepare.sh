#!/bin/sh
# Puts the wheel of this source tree, and the versions it is tested with, where the add-on's Dockerfile looks for them.
# Then copy this folder to /addons/cesar_mqtt on the Home Assistant machine.
#   prepare.sh            (PYTHON=... names the Python whose pip is used)
set -eu

cd "$(dirname "$0")"
mkdir -p wheels
rm -f wheels/*.whl
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir wheels ../..
cp ../../constraints.txt wheels/
echo "ready: copy $(pwd) to /addons/cesar_mqtt"
