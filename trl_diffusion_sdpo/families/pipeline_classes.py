"""The pipeline classes that this package trains, by "module:Class" of their family.

A family loads saved pipelines of any of its classes as the first, which makes images from text.
"""

PIPELINE_CLASSES: dict[str, tuple[str, ...]] = {
    "stable_diffusion:StableDiffusionFamily": (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    ),
    "stable_diffusion_xl:StableDiffusionXLFamily": ("StableDiffusionXLPipeline",),
    "stable_diffusion_3:StableDiffusion3Family": (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    ),
    "flux:FluxFamily": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "flux:FluxKontextFamily": ("FluxKontextPipeline",),
    "pixart:PixArtAlphaFamily": ("PixArtAlphaPipeline",),
    "pixart:PixArtSigmaFamily": ("PixArtSigmaPipeline",),
    "sana:SanaFamily": ("SanaPipeline",),
    "qwen_image:QwenImageFamily": ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "qwen_image_21:QwenImage21Family": ("QwenImage21Pipeline",),
    "chroma:ChromaFamily": ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    "krea2:Krea2Family": ("Krea2Pipeline",),
    "z_image:ZImageFamily": ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    "ovis_image:OvisImageFamily": ("OvisImagePipeline",),
    "lumina2:Lumina2Family": ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
    "aura_flow:AuraFlowFamily": ("AuraFlowPipeline",),
    "cogview4:CogView4Family": ("CogView4Pipeline",),
    "hunyuan_dit:HunyuanDiTFamily": ("HunyuanDiTPipeline",),
    "flux2:Flux2Family": ("Flux2Pipeline",),
    "flux2:Flux2KleinFamily": ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
    "ideogram4:Ideogram4Family": ("Ideogram4Pipeline",),
    "longcat_image:LongCatImageFamily": ("LongCatImagePipeline",),
    "longcat_image:LongCatImageEditFamily": ("LongCatImageEditPipeline",),
    "qwen_image:QwenImageEditFamily": ("QwenImageEditPipeline",),
    "qwen_image:QwenImageEditPlusFamily": ("QwenImageEditPlusPipeline",),
    "ernie_image:ErnieImageFamily": ("ErnieImagePipeline",),
    "hidream:HiDreamFamily": ("HiDreamImagePipeline",),
    "wan:WanFamily": ("WanPipeline",),
}
