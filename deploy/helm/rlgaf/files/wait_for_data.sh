#!/bin/sh
# Wait until every file or folder given exists: wait_for_data.sh SECONDS PATH...
seconds=$1
shift
end=$(($(date +%s) + seconds))
for path in "$@"; do
  until [ -e "$path" ]; do
    if [ "$(date +%s)" -ge "$end" ]; then
      echo "$path is not there after $seconds s; put it on the volume or raise data.waitTimeoutSeconds" >&2
      exit 1
    fi
    echo "waiting for $path"
    sleep 5
  done
  echo "found $path"
done
