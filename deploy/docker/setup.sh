#!/bin/sh
# Makes what compose.yaml needs, beside it: folders, the broker's password in a file, and .env.
#   setup.sh --broker URL [--ca FILE]   for the broker that you have: mqtt://USER@HOST, mqtts://USER@HOST, mqtt://HOST.
#                                       Asks for the password of USER, or reads it from stdin. FILE: the broker's own
#                                       authority, in PEM
#   setup.sh [HOST]                     with mosquitto in a container of its own, its passwords and its access list; with
#                                       HOST, the name of this machine in your network, with TLS
# It can be run again: existing passwords and certificates are kept, and so are the lines of .env that are not its own.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
usage() {
    sed -n 's/^# \{0,1\}//; 3,7p' "$here/setup.sh" >&2
    exit 2
}
broker=
host=
ca=
while [ $# -gt 0 ]; do
    case $1 in
    --broker | --ca)
        [ $# -gt 1 ] || usage
        if [ "$1" = --ca ]; then ca=$2; else broker=$2; fi
        shift
        ;;
    -*) usage ;;
    *) host=$1 ;;
    esac
    shift
done
[ -z "$broker" ] || [ -z "$host" ] || usage
[ -z "$ca" ] || [ -n "$broker" ] || usage

umask 077
mkdir -p "$here/state/config" "$here/state/data" "$here/state/models" "$here/state/ca"
mkdir -p -m 755 "$here/audio"
[ -z "$ca" ] || cp "$ca" "$here/state/ca/ca.pem"
cd "$here"
touch .env
secret=state/config/broker-password
password_file=/run/secrets/broker-password
files=compose.yaml

if [ -n "$broker" ]; then
    case $broker in
    mqtt://* | mqtts://* | ws://* | wss://*) ;;
    *)
        echo "the broker must be a URL, such as mqtt://USER@HOST: $broker" >&2
        exit 2
        ;;
    esac
    address=${broker#*://}
    address=${address%%/*}
    case ${address##*@} in
    localhost* | 127.* | "[::1]"*)
        echo "${address##*@} would be the container itself. Name this machine by its address in your network, or write" >&2
        echo "host.docker.internal; its broker must listen on that address, not on loopback only" >&2
        exit 2
        ;;
    esac
    case $address in
    *:*@*)
        echo "leave the password out of the URL: setup.sh asks for it" >&2
        exit 2
        ;;
    *@*)
        if [ -s "$secret" ] && grep -qxF "CESAR_BROKER__URL=$broker" .env; then
            echo "the password is the one in $PWD/$secret; delete that file to enter another" >&2
        else
            if [ -t 0 ]; then
                printf 'Password of %s at the broker: ' "${address%%@*}" >&2
                trap 'stty echo' EXIT
                stty -echo
            fi
            read -r password || [ -n "$password" ]
            if [ -t 0 ]; then
                stty echo
                trap - EXIT
                echo >&2
            fi
            printf '%s\n' "$password" >"$secret"
        fi
        ;;
    *)
        : >"$secret"
        password_file=
        ;;
    esac
else
    files=$files:compose.mosquitto.yaml
    broker=mqtt://cesar@mosquitto:1883
    mkdir -p state/mosquitto
    # mosquitto_passwd is part of mosquitto; without it, the one in the broker's image is used.
    if command -v mosquitto_passwd >/dev/null; then
        ../mosquitto/make-passwords.sh state/config
    else
        docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/../mosquitto:/scripts:ro" --volume "$PWD/state:/state" \
            --entrypoint /scripts/make-passwords.sh eclipse-mosquitto:2.0.22@sha256:212f89e1eaeb2c322d6441b64396e3346026674db8fa9c27beac293405c32b3c /state/config
    fi
    cp state/config/cesar.password "$secret"
    cp ../mosquitto/acl state/config/acl
    chmod 600 state/config/acl
    if [ -n "$host" ]; then
        ../mosquitto/make-certificates.sh state/certificates "mosquitto,$host"
        cp state/certificates/ca.pem state/ca/ca.pem
        files=$files:compose.tls.yaml
        broker=mqtts://cesar@mosquitto:8883
    fi
fi
ca_file=
case $broker in
mqtts://* | wss://*) [ ! -e state/ca/ca.pem ] || ca_file=/run/ca/ca.pem ;;
esac

. ../mosquitto/container-user.sh
own='^(COMPOSE_FILE|CESAR_UID|CESAR_GID|CESAR_BROKER__URL|CESAR_BROKER__PASSWORD_FILE|CESAR_BROKER__CA_FILE)='
{
    grep -Ev "$own" .env || :
    printf '%s\n' "COMPOSE_FILE=$files" "CESAR_UID=$uid" "CESAR_GID=$gid" "CESAR_BROKER__URL=$broker" \
        "CESAR_BROKER__PASSWORD_FILE=$password_file" "CESAR_BROKER__CA_FILE=$ca_file"
} >.env.new
mv .env.new .env
echo "ready: docker compose up --detach --build"
