#!/bin/sh
# Makes throw-away certificates for tests: an authority, a server (localhost, 127.0.0.1) and a client
# named NAME.
#
# usage: make_certificates.sh DIR [NAME]     writes ca.pem, server.pem, server.key, client.pem, client.key
set -eu
dir=$1
name=${2:-test-client}
mkdir -p "$dir"
cd "$dir"
exec 2>openssl.log

new_key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }

new_key ca.key
openssl req -x509 -new -key ca.key -days 2 -subj "/CN=Firesteel test authority" -out ca.pem
for who in server client; do
  new_key "$who.key"
  subject=localhost extension="subjectAltName=DNS:localhost,IP:127.0.0.1"
  [ "$who" = server ] || { subject=$name; extension="subjectAltName=DNS:$name"; }
  openssl req -new -key "$who.key" -subj "/CN=$subject" -out "$who.csr"
  echo "$extension" >"$who.ext"
  openssl x509 -req -in "$who.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
    -extfile "$who.ext" -out "$who.pem"
done
