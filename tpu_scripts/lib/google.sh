# What both Google Cloud backends need: a bucket in which folders can be renamed.
# shellcheck shell=bash

# A checkpoint is written under another name and renamed when it is whole. In a mounted bucket that works
# with a hierarchical namespace only.
check_bucket() {
  ask True gcloud storage buckets describe "gs://$BUCKET" "--format=value(hierarchical_namespace.enabled)" ||
    die "setting BUCKET_PATH: gs://$BUCKET cannot be read: $(explain "$ERRORS") ($ERRORS)"
  [[ $ANSWER == True ]] || die "setting BUCKET_PATH: gs://$BUCKET has no hierarchical namespace, without which no" \
    "checkpoint can be renamed when it is whole; make another bucket: gcloud storage buckets create gs://NAME" \
    "--location=REGION --uniform-bucket-level-access --enable-hierarchical-namespace"
}
