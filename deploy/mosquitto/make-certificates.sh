#!/bin/sh
# Makes an authority of your own and a certificate for the broker, in PEM files.
#   make-certificates.sh FOLDER HOST [CLIENT...]
# HOST is the name or the IPv4 address that clients connect to, or several, joined by commas. Clients check it, so it must
# be the one in the broker's URL. Each CLIENT gets a client certificate. Existing files are kept; remove one to renew it.
# Clients need ca.pem only. Keep ca.key away from the broker: it can issue any certificate.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 FOLDER HOST [CLIENT...]" >&2
    exit 2
fi
folder=$1
host=$2
shift 2
days=825

umask 077
mkdir -p "$folder"
cd "$folder"

new_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null
}

# sign NAME USAGE ALTERNATIVE: a certificate NAME.pem with the key NAME.key
sign() {
    [ ! -e "$1.pem" ] || return 0
    new_key "$1.key"
    openssl req -new -key "$1.key" -subj "/CN=$1" -out "$1.csr"
    {
        echo 'basicConstraints = critical, CA:false'
        echo 'keyUsage = critical, digitalSignature'
        echo "extendedKeyUsage = $2"
        echo "subjectAltName = $3"
        echo 'subjectKeyIdentifier = hash'
        echo 'authorityKeyIdentifier = keyid'
    } >"$1.ext"
    openssl x509 -req -in "$1.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days "$days" -extfile "$1.ext" \
        -out "$1.pem" 2>/dev/null
    rm "$1.csr" "$1.ext"
    echo "$folder/$1.pem"
}

if [ ! -e ca.pem ]; then
    new_key ca.key
    openssl req -x509 -new -key ca.key -days 3650 -subj "/CN=cesar-mqtt authority" -out ca.pem \
        -addext 'basicConstraints = critical, CA:true' -addext 'keyUsage = critical, keyCertSign, cRLSign'
    echo "$folder/ca.pem"
fi

alternatives=
for name in $(echo "$host" | tr , ' '); do
    case $name in
    *[!0-9.]*) alternatives=$alternatives,DNS:$name ;;
    *) alternatives=$alternatives,IP:$name ;;
    esac
done
# A broker that connects to another one is a client there (routes of NATS, bridges of mosquitto).
sign broker serverAuth,clientAuth "${alternatives#,}"
for client; do
    sign "$client" clientAuth "DNS:$client"
done
chmod 644 ca.pem ./*.pem
