#!/bin/sh
# Makes what compose.yaml needs, in folders beside it: passwords, the ACL, folders for the data, and .env with the user
# that both containers run as. With HOST (the broker's name in your network) also certificates.
#   setup.sh [HOST]
# May be run again: what is there stays.
set -eu

cd "$(dirname "$0")"
umask 077
mkdir -p state/config state/mosquitto state/data
mkdir -p -m 755 audio

# mosquitto_passwd comes with the broker; where that is not installed, the broker's image has it.
if command -v mosquitto_passwd >/dev/null; then
    ../mosquitto/make-passwords.sh state/config
else
    docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/../mosquitto:/scripts:ro" --volume "$PWD/state:/state" \
        --entrypoint /scripts/make-passwords.sh eclipse-mosquitto:2.0.22 /state/config
fi
cp ../mosquitto/acl state/config/acl
chmod 600 state/config/acl

if [ $# -gt 0 ]; then
    ../mosquitto/make-certificates.sh state/certificates "mosquitto,$1"
fi

uid=$(id -u)
gid=$(id -g)
if [ "$uid" = 0 ]; then
    # No container runs as root: the files go to a number that nobody else has.
    uid=10001
    gid=10001
    chown -R "$uid:$gid" state
fi
printf 'CESAR_UID=%s\nCESAR_GID=%s\n' "$uid" "$gid" >.env
echo "ready: docker compose up --detach --build"
