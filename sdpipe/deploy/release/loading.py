"""How a deployed file is loaded without sdpipe, in three languages: a section of the model card."""

from string import Template

from sdpipe.runtime.artifact import INPUT, OUTPUTS
from sdpipe.runtime.metadata import Metadata

_PYTHON = Template("""\
import json, numpy, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
names = json.loads(session.get_modelmeta().custom_metadata_map["sdpipe.class_names"])
picture = ImageOps.exif_transpose(Image.open("picture.png"))
if picture.mode[0] in "IF":
    raise SystemExit("grey of more than 8 bits; sdpipe predict reads whole numbers up to 65535")
if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
picture = ImageOps.fit(picture.convert("$mode"), ($width, $height), Image.Resampling.BILINEAR, bleed=$bleed)
images = numpy.asarray(picture, numpy.uint8).reshape(1, $height, $width, $channels)
probabilities = session.run(["$output"], {"$input": images})[0]
print(names[probabilities[0].argmax()], probabilities[0].max())
""")

_CPP = Template("""\
#include <algorithm>
#include <iostream>
#include <vector>
#include <onnxruntime_cxx_api.h>

int main() {
  Ort::Env env;
  Ort::Session session(env, "model.onnx", Ort::SessionOptions());  // Windows: L"model.onnx"
  std::vector<uint8_t> pixels($size);  // $height rows of $width pixels of $channels channels
  const std::vector<int64_t> shape{1, $height, $width, $channels};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto images = Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape.data(), 4);
  const char *inputs[] = {"$input"}, *outputs[] = {"$output"};
  auto results = session.Run(Ort::RunOptions(), inputs, &images, 1, outputs, 1);
  const float* probabilities = results[0].GetTensorData<float>();
  const float* best = std::max_element(probabilities, probabilities + $classes);
  std::cout << "class " << best - probabilities << ", probability " << *best << "\\n";
}
""")

_JAVASCRIPT = Template("""\
const ort = require("onnxruntime-node");  // in a browser: onnxruntime-web

async function main() {
  const session = await ort.InferenceSession.create("model.onnx");
  const pixels = new Uint8Array($size);  // $height rows of $width pixels of $channels channels
  const images = new ort.Tensor("uint8", pixels, [1, $height, $width, $channels]);
  const probabilities = (await session.run({ $input: images })).$output.data;
  const best = probabilities.indexOf(Math.max(...probabilities));
  console.log(`class $${best}, probability $${probabilities[best]}`);
}
main();
""")


def loading_section(metadata: Metadata) -> str:
    """Markdown with code in Python, C++ and JavaScript for this very network."""
    height, width = metadata.image_size
    values = {
        "input": INPUT,
        "output": OUTPUTS[1],
        "height": height,
        "width": width,
        "channels": metadata.channels,
        "size": height * width * metadata.channels,
        "classes": len(metadata.class_names),
        "mode": "L" if metadata.channels == 1 else "RGB",
        "bleed": repr((1 - metadata.crop_fraction) / 2),
    }
    blocks = (
        ("With onnxruntime, numpy and Pillow in Python", "python", _PYTHON),
        ("With onnxruntime in C++, from pixels that are prepared as below", "cpp", _CPP),
        ("With onnxruntime in JavaScript, from the same", "javascript", _JAVASCRIPT),
    )
    text = (
        f"## How to load it\n\nInput `{INPUT}`: uint8, (N, {height}, {width}, {metadata.channels}). "
        f"Outputs `{OUTPUTS[0]}` and `{OUTPUTS[1]}`: float32, (N, {len(metadata.class_names)}). "
        "The class names are in the file's metadata, as JSON, under `sdpipe.class_names`. onnxruntime 1.31 "
        "for Linux reports to its makers which model is opened, with its metadata; the environment variable "
        "`ORT_DISABLE_TELEMETRY=1` keeps it from that.\n"
    )
    for title, language, template in blocks:
        text += f"\n{title}:\n\n```{language}\n{template.substitute(values)}```\n"
    return text
