#!/bin/sh
# SeaweedFS with one S3 identity, from S3_ACCESS_KEY and S3_SECRET_KEY. Releases differ in how they treat credentials in
# the environment, so they go into a file that only this container has.
set -eu
umask 077
printf '{"identities": [{"name": "afterimage", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}' \
    "${S3_ACCESS_KEY:?}" "${S3_SECRET_KEY:?}" > /tmp/s3.json
exec weed -logtostderr=true server -dir=/data -s3 -s3.port=8333 -s3.config=/tmp/s3.json -volume.max=0 -ip.bind=0.0.0.0
