# The demo in a container, on a CPU or a GPU. The tests do not build it.
#   docker build -t tag2mask . && docker run --shm-size=8g -v "$PWD/logs:/tag2mask/logs" tag2mask        (a GPU: --gpus all)
# PyTorch's usual build holds gigabytes of CUDA: --build-arg TORCH_INDEX=URL names the index of its CPU builds (README, "Install").
FROM python:3.12-slim
ARG TORCH_INDEX
WORKDIR /tag2mask
COPY requirements.txt .
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision; fi \
 && pip install --no-cache-dir -r requirements.txt
COPY . .
ENV PYTHON=python
CMD ["bash", "run_demo.sh"]
