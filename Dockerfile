# The program in a container. The photographs are mounted read-only, results and cache stay outside the container:
#
#   docker build -t skin-grading .
#   mkdir -p runs
#   docker run --rm --init --gpus all --shm-size=1g --stop-timeout 120 --user "$(id -u):$(id -g)" \
#     -v "$PWD/data:/data:ro" -v "$PWD/runs:/runs" -v skin-grading-cache:/cache \
#     skin-grading /app/main.py --data_dirs /data/forehead_wrinkles --wandb_mode disabled
#
# --gpus all       needs the NVIDIA Container Toolkit; leave it out to train on the CPU
# --shm-size       /dev/shm, through which loader workers hand over their batches: Docker's 64 MB is enough for few of them
# --stop-timeout   seconds that a training has to save itself after "docker stop"
# --user           the owner of the files in runs/; on Windows and macOS leave it out
FROM python:3.11-slim-bookworm

# decoded images, ImageNet weights, fonts
ENV XDG_CACHE_HOME=/cache \
    TORCH_HOME=/cache/torch \
    MPLCONFIGDIR=/cache/matplotlib \
    PYTHONDONTWRITEBYTECODE=1

# fonts-nanum: class names in Hangul in plots; /cache and /runs are for any user, because of --user
COPY requirements.txt /app/
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends fonts-nanum \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir -r /app/requirements.txt \
    && useradd --uid 1000 --create-home grader \
    && install -d -m 1777 /cache /runs

COPY . /app/

USER 1000
VOLUME /cache
# run folders have relative names
WORKDIR /runs
ENTRYPOINT ["python"]
CMD ["/app/main.py", "--help"]
